"""``python -m planner`` is ``layerwise``."""

from planner.cli.start import main

if __name__ == "__main__":
    main()
