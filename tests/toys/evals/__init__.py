"""Evaluations of the tests' own, which do what none should."""
