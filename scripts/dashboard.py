#!/usr/bin/env python
"""Run a Visdom server on 127.0.0.1, stop one (--stop), or fetch what it needs from the internet (--prepare)."""

import sys

from gravitar_dqn.cli.commands import dashboard_command, run

if __name__ == "__main__":
    sys.exit(run(dashboard_command, sys.argv[1:], "dashboard.py"))
