"""The console script, and `python -m longtake`, as torchrun starts it."""

import sys


def main() -> None:
    """Runs the command line; Ctrl-C while that is still being loaded leaves no traceback."""
    try:
        from longtake.cli.app import main as start
    except KeyboardInterrupt:
        sys.exit(130)
    start()


if __name__ == "__main__":
    main()
