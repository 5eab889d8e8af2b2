"""Output for people: tables, plots, logs, and the run folders that they read."""
