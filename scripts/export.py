#!/usr/bin/env python
"""Write what runs have logged for another program: export.py RUN_DIR [RUN_DIR ...] --to tensorboard."""

import sys

from gravitar_dqn.cli.commands import export_command, run

if __name__ == "__main__":
    sys.exit(run(export_command, sys.argv[1:], "export.py"))
