"""Convert the model of a Hugging Face folder to a megatron-core checkpoint (torch_dist).

    python tools/convert_hf_to_megatron.py HF_DIR OUT [--tensor 8 --pipeline 4 --expert 2] [--verify]

Runs in one process on the CPU, with one parameter in memory at a time. A checkpoint does not depend on a layout: any
layout can load it. --tensor, --pipeline and --expert only check, before the conversion, that the model can be sharded
in that layout. Configuration, tokenizer and generation settings are copied to OUT/hugging_face. In case of an error,
one line is printed, the exit status is 2, and nothing is left at OUT.
"""

import argparse
import os
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hf_dir", type=Path, metavar="HF_DIR", help="folder with config.json and safetensors")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    for flag in ("tensor", "pipeline", "expert"):
        parser.add_argument(
            f"--{flag}", type=int, default=1, metavar="N", help=f"check that the model fits {flag}-parallel size N"
        )
    parser.add_argument("--verify", action="store_true", help="then compare the logits of both models (loads both)")
    options = parser.parse_args()
    if min(options.tensor, options.pipeline, options.expert) < 1:
        parser.error("--tensor, --pipeline and --expert must be at least 1")

    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tolerance of --verify is for fp32 on the CPU
    from rich.console import Console
    from rich.progress import track

    from megatron_rlvr.convert.conversion import check_layout, errors_in_one_line, to_megatron
    from megatron_rlvr.convert.verification import verify

    with errors_in_one_line(options.out):
        check_layout(options.hf_dir, options.tensor, options.pipeline, options.expert)
        console = Console(stderr=True)
        to_megatron(options.hf_dir, options.out, lambda rows: track(rows, "converting", console=console))
        if options.verify:
            print(verify(options.hf_dir, options.out))


if __name__ == "__main__":
    main()
