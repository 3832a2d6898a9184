"""The ``sluice`` command. Nothing here imports torch: the work is done in child processes."""
