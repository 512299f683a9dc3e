"""`python -m longtake`, as torchrun starts it."""

from longtake.cli.app import main

if __name__ == "__main__":
    main()
