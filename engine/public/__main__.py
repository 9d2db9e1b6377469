"""``python -m flowreel``: the command line."""

from flowreel.engine.cli import main

if __name__ == "__main__":
    main()
