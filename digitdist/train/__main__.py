"""The command ``accelerate launch -m digitdist.train [--config FILE] [key=value ...]``."""

from digitdist.distributed import run_command
from digitdist.train.command import main

if __name__ == "__main__":
    run_command(main)
