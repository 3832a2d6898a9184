"""Where what comes with the program lies."""

from pathlib import Path

HOME = (Path(__file__).parent / "shipped" / "slurm").resolve().parent
"""Holds ``slurm/`` and ``configs/``: the checkout, or the folder where an installed package has them."""
