#!/usr/bin/env python3
"""The command `rlvr plan` as a script; `python tools/plan.py --help` explains it."""

import sys

from megatron_rlvr.cli import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
