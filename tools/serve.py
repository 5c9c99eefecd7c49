#!/usr/bin/env python3
"""The command `rlvr serve` as a script; `python tools/serve.py --help` explains it."""

import sys

from megatron_rlvr.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
