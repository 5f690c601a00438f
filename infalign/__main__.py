"""`python -m infalign` and `accelerate launch -m infalign` are the command line."""

from infalign.cli import main
from infalign.runtime.distributed import end_process

if __name__ == "__main__":
    end_process(main())
