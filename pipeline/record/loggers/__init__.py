"""Where a run's curves are shown beside its own files: one program a file, ``[record] loggers`` names them."""
