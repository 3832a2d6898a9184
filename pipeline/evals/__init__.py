"""Evaluations, one file each; the file's name is the evaluation's name (see :mod:`pipeline.core.registry`)."""
