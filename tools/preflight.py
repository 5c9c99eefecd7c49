#!/usr/bin/env python3
"""Checks a cluster before a long run: prints a table of what passed, what failed, and how to fix it.

    torchrun --nproc-per-node 8 tools/preflight.py CONFIG.yaml             started in the same way as the run
    torchrun ... tools/preflight.py CONFIG.yaml --rollout.servers '[http://node7:30000]'   with flags of the run
    python tools/preflight.py CONFIG.yaml                                  if one rank is enough
    torchrun ... tools/preflight.py CONFIG.yaml --only servers mismatch    after a fix
    torchrun ... tools/preflight.py CONFIG.yaml --skip rehearsal --json results.json

Servers must be running. One step is rehearsed by the run's own code, with its layout, engine and servers, on a few
prompts and short responses, in a temporary folder: run.dir is not changed, nothing is resumed, and servers get the
weights of model.path back. docs/preflight.md explains each line and its limits.

Exit status: 0 if nothing failed (a warning is no failure), 1 if something did, 2 and one line on stderr for wrong
arguments or settings, 128 + n after signal n.
"""

import sys

from megatron_rlvr.preflight.command import main

if __name__ == "__main__":
    main(sys.argv[1:], __doc__)
