"""Shared by the tests: toys, commands, faults, stand-ins for W&B and Slurm."""
