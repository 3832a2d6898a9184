"""Errors that a user can mend. Each message says what is wrong, where, and what to do.

The command line prints them without a traceback and exits with ``exit_code``. What only a bug can cause is an
``assert``. Exit codes are an interface (see :mod:`pipeline.config.exitcodes`).
"""


class SluiceError(Exception):
    """Base of all errors that are the user's to mend."""

    exit_code = 2
    everywhere = False
    """Raised on every rank alike, so that rank 0 alone need print it."""


class ConfigError(SluiceError):
    """A mistake in a configuration file or on the command line."""

    everywhere = True


class DataError(SluiceError):
    """Shards, manifest or samples that are missing, damaged or not what they promise to be."""


class CheckpointError(SluiceError):
    """A checkpoint that cannot be written, read or trusted; the ranks agree on it."""

    everywhere = True


class LaunchError(SluiceError):
    """A job that cannot be started as asked."""


class NonFiniteError(SluiceError):
    """A loss or gradient norm that is not finite; raised on every rank in the same step."""

    exit_code = 70
    everywhere = True
    step: int | None = None
    """Of the training in which it came up."""
