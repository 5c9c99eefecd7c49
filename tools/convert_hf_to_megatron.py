"""Writes the model of a Hugging Face folder as a megatron-core checkpoint (torch_dist).

    python tools/convert_hf_to_megatron.py HF_DIR OUT [--tensor 8 --pipeline 4 --expert 2] [--verify]

One process on the CPU, one parameter in memory at a time. A checkpoint has no layout: every one reads it. The sizes of
a layout may be given to learn before the work whether the model can be cut that way; they change nothing of what is
written. Configuration, tokenizer and generation settings go to OUT/hugging_face. Exit status 2 and one line where
something is wrong, and then nothing is left at OUT.
"""

import argparse
import os
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hf_dir", type=Path, metavar="HF_DIR", help="folder with config.json and safetensors")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must be new")
    for flag in ("tensor", "pipeline", "expert"):
        parser.add_argument(f"--{flag}", type=int, default=1, metavar="N", help="refuse a model that N does not divide")
    parser.add_argument("--verify", action="store_true", help="then compare the logits of both (loads both models)")
    options = parser.parse_args()
    if min(options.tensor, options.pipeline, options.expert) < 1:
        parser.error("--tensor, --pipeline and --expert are at least 1")

    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # fp32 on the CPU is what the comparison's tolerance is for
    from rich.console import Console
    from rich.progress import track

    from megatron_rlvr.convert.conversion import check_layout, errors_in_one_line, to_megatron, verify

    with errors_in_one_line(options.out):
        check_layout(options.hf_dir, options.tensor, options.pipeline, options.expert)
        console = Console(stderr=True)
        to_megatron(options.hf_dir, options.out, lambda rows: track(rows, "converting", console=console))
        if options.verify:
            print(verify(options.hf_dir, options.out))


if __name__ == "__main__":
    main()
