"""Run the command line, see `optuna_nnhp.workers.command_line`."""

import sys

from optuna_nnhp.workers.command_line import main

if __name__ == "__main__":
    sys.exit(main())
