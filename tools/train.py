#!/usr/bin/env python3
"""The command `rlvr train` as a script; `python tools/train.py --help` explains it."""

import sys

from megatron_rlvr.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
