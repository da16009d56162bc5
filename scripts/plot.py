#!/usr/bin/env python
"""Draw the learning curves of runs: plot.py RUN_DIR [RUN_DIR ...] [options]."""

import sys

from gravitar_dqn.cli.commands import plot_command, run

if __name__ == "__main__":
    sys.exit(run(plot_command, sys.argv[1:], "plot.py"))
