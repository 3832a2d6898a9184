"""Typed configuration. Nothing in this package imports torch."""
