#!/usr/bin/env python
"""Train presets and variants of them with several seeds, and compare: sweep.py PRESET [PRESET ...] [options]."""

import sys

from gravitar_dqn.cli.commands import run, sweep_command

if __name__ == "__main__":
    sys.exit(run(sweep_command, sys.argv[1:], "sweep.py"))
