"""steer_heal: steer a language model, heal its text under a divergence barrier, and measure what that bought."""

__version__ = "0.1.0"
