"""What runs suites of evaluations."""
