"""`python -m klpemu` is `klpemu`."""

from klpemu.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
