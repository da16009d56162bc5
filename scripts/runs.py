#!/usr/bin/env python
"""List runs and how each stands: runs.py [FOLDER ...]."""

import sys

from gravitar_dqn.cli.commands import run, runs_command

if __name__ == "__main__":
    sys.exit(run(runs_command, sys.argv[1:], "runs.py"))
