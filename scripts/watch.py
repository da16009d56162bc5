#!/usr/bin/env python
"""Record games of a run's newest checkpoint: watch.py RUN_DIR."""

import sys

from gravitar_dqn.cli.commands import run, watch_command

if __name__ == "__main__":
    sys.exit(run(watch_command, sys.argv[1:], "watch.py"))
