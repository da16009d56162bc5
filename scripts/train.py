#!/usr/bin/env python
"""Train an agent: train.py [PRESET] [options]."""

import sys

from gravitar_dqn.cli.commands import run, train_command

if __name__ == "__main__":
    sys.exit(run(train_command, sys.argv[1:], "train.py"))
