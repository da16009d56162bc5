#!/usr/bin/env python3
"""Run a Visdom server on 127.0.0.1, stop one (--stop), or fetch what it needs from the internet (--prepare)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works uninstalled too

from gravitar_dqn.visdom_server import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
