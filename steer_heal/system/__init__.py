"""The process and its surroundings: signals, other processes, the terminal."""
