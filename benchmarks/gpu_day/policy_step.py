"""Part `policy`: a policy of random parameters through a whole step on one GPU: seconds and memory, beside the planner.

Qwen3's shapes of 4 billion parameters if the planner says that they fit, else of 1.7 billion, with full recompute; two
micro-batches of 24,576 tokens, of which the longest sequence has 22,527. Phases: build (with weights and optimizer),
score, selection of a fifth of the tokens, two training steps, export, and where transformers is installed the weight
sync to the embedded engine and a rollout. Layers are Transformer Engine's if that can be used.

The planner's memory is that of training. Its seconds are its operations over a share of the peak, of which `rlvr plan`
assumes 0.45; the table has the share that was achieved.
"""

import importlib

from rows import Rows, options_of

from megatron_rlvr.distributed import environment


def main() -> None:
    options = options_of(__doc__)
    environment.set_defaults({})  # before torch is imported
    importlib.import_module("policy_phases").run(Rows(options.rows), options.device, options.small)


if __name__ == "__main__":
    main()
