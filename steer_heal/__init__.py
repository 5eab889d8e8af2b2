"""Steer a language model, heal its text under a divergence barrier, and measure what that bought."""

from steer_heal.system.spinning import limit_spinning

__version__ = "0.1.0"

limit_spinning()  # before anything imports torch
