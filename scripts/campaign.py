#!/usr/bin/env python
"""Tests, benchmark, the longest run that the time allows, its results, in pieces: campaign.py [PRESET] [options]."""

import sys

from gravitar_dqn.cli import campaign_command, run

if __name__ == "__main__":
    sys.exit(run(campaign_command, sys.argv[1:], "campaign.py"))
