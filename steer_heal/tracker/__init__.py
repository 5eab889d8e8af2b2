"""Where a run's measurements go."""
