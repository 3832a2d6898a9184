"""Sluice: large-scale visual pretraining, from sharded streams to evaluated checkpoints."""

__version__ = "0.1.0"
