#!/usr/bin/env python3
"""The command `rlvr convert` as a script; `python tools/convert.py --help` explains it."""

import sys

from megatron_rlvr.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
