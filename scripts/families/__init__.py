"""Tiny random models of every family in transformers, and our path on each of them compared with plain transformers."""
