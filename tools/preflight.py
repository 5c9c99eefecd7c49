#!/usr/bin/env python3
"""Checks a cluster before a long run: a table of what passed, what failed, and what to do about it.

    torchrun --nproc-per-node 8 tools/preflight.py CONFIG.yaml             started as the run itself will be
    torchrun ... tools/preflight.py CONFIG.yaml --rollout.servers '[http://node7:30000]'   flags of the run, too
    python tools/preflight.py CONFIG.yaml                                  where one rank is enough
    torchrun ... tools/preflight.py CONFIG.yaml --only servers gap         after something was put right
    torchrun ... tools/preflight.py CONFIG.yaml --skip rehearsal --json found.json

Servers must be up. One step is rehearsed by the run's own code, with its layout, engine and servers, on a few prompts
and short responses, in a folder that is removed: run.dir is left as it is, nothing is resumed, and servers get the
weights of model.path back. docs/preflight.md says what each line means and where its limits come from.

Exit status: 0 if nothing failed (warnings are no failures), 1 if something did, 2 and one line for wrong arguments or
settings, 128 + n after signal n.
"""

import sys

from megatron_rlvr.preflight.command import main

if __name__ == "__main__":
    main(sys.argv[1:], __doc__)
