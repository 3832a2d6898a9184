"""Every objective and evaluation: the server of ``tests/ranks.py`` imports them once, for all ranks."""

from contextlib import suppress

from pipeline.core import registry

for package in ("pipeline.objectives", "pipeline.evals"):
    for name in registry.names(package):
        with suppress(Exception):  # one that is broken is so where it is tested, not in all tests
            registry.module(package, name)
