"""Learning-rate schedules, one a file; see :mod:`pipeline.config.schedule`."""
