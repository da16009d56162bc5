#!/usr/bin/env python
"""Measure speed: benchmark.py [--quick] [--json FILE]."""

import sys

from gravitar_dqn.cli.commands import bench_command, run

if __name__ == "__main__":
    sys.exit(run(bench_command, sys.argv[1:], "benchmark.py"))
