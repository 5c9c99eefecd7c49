#!/usr/bin/env python3
"""Estimates memory, time and the best layouts of a run from config.json alone; needs no GPU and no weights.

    python tools/plan.py CONFIG.yaml --gpus 64 --gpu h100
    python tools/plan.py --model DIR --gpus 64 --gpu h100 --prompts 512 --group-size 16 \\
        --prompt-tokens 2048 --response-tokens 20480 --mean-response-tokens 8000

With CONFIG.yaml, model, lengths, batch and layout are the run's; its own layout is listed first, then others. With
--model, options give them instead. Every layout in the table is one that the trainer accepts, with the least activation
checkpointing (recompute) with which it fits. Below the table are memory by part and time by phase of the best layout
(or of the requested one), the assumption behind each estimate, and the settings to paste.

How much is known: bytes of weights, gradients, optimizer and KV cache are counted and exact to a percent; activations
to a few percent for this project's own layers, counted from the source for Transformer Engine's; seconds are a roofline
with given shares of the peaks, good for comparing layouts, and otherwise as accurate as --mfu, --bandwidth-share and
--mean-response-tokens. docs/planning.md has the formulas.

  columns   tp cp pp vp ep dp   parallel.tensor, context, pipeline, virtual_pipeline, expert; data-parallel replicas
            GiB, free           peak of training on the fullest GPU, and what remains of the memory it may use
            rollout .. total    seconds of a step's phases; tokens/s: response tokens trained on

Exit status: 0; 1 if the requested layout, or every layout, does not fit (the output says by how much); 2 and one line
on stderr if the input is wrong.
"""

import sys

from megatron_rlvr.planner.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__))
