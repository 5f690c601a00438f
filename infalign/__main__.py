"""`python -m infalign` and `accelerate launch -m infalign` are the command line."""

from infalign.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
