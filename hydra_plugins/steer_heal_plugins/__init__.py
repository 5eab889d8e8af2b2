"""Our plugins of Hydra, which accepts them nowhere else."""
