#!/usr/bin/env python3
"""The command `rlvr preflight` as a script; `python tools/preflight.py --help` explains it."""

import sys

from megatron_rlvr.cli import main

if __name__ == "__main__":
    sys.exit(main(["preflight", *sys.argv[1:]]))
