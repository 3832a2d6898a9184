"""The only wiring: configuration, data, objective, engine, loop, evaluations; and what an end means as exit code."""
