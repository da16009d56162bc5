#!/usr/bin/env python
"""Evaluate a run's newest checkpoint: evaluate.py RUN_DIR."""

import sys

from gravitar_dqn.cli.commands import evaluate_command, run

if __name__ == "__main__":
    sys.exit(run(evaluate_command, sys.argv[1:], "evaluate.py"))
