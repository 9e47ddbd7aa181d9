"""Run, compare and plan expert-parallel inference of Mixture-of-Experts models."""

__version__ = "0.1.0"
