"""``python -m launch`` is ``sluice``, also where nothing was installed."""

from launch.cli import main

main()
