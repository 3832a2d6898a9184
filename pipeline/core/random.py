"""Placeholder while the real generator is being written."""
