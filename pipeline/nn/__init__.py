"""Modules and maths that objectives and evaluations are built of."""
