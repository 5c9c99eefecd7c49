"""Convert the model of a megatron-core checkpoint (torch_dist), saved in any layout, to a Hugging Face folder.

    python tools/convert_megatron_to_hf.py CKPT OUT [--shard-size 5] [--verify]

Runs in one process on the CPU, with one parameter in memory at a time. Configuration, tokenizer and generation settings
are copied from CKPT/hugging_face. Other tensors of the checkpoint, such as an optimizer's, are ignored. In case of an
error, one line is printed, the exit status is 2, and nothing is left at OUT.
"""

import argparse
import os
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="folder with metadata.json and hugging_face/")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    parser.add_argument(
        "--shard-size", type=float, default=5.0, metavar="GB", help="maximum size of a safetensors file (default: 5)"
    )
    parser.add_argument("--verify", action="store_true", help="then compare the logits of both models (loads both)")
    options = parser.parse_args()
    if not options.shard_size > 0:
        parser.error("--shard-size must be above 0")

    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tolerance of --verify is for fp32 on the CPU
    from rich.console import Console
    from rich.progress import track

    from megatron_rlvr.convert.conversion import errors_in_one_line, to_hugging_face
    from megatron_rlvr.convert.verification import verify

    with errors_in_one_line(options.out):
        console, size = Console(stderr=True), int(options.shard_size * 1e9)
        to_hugging_face(options.checkpoint, options.out, size, lambda rows: track(rows, "converting", console=console))
        if options.verify:
            print(verify(options.out, options.checkpoint))


if __name__ == "__main__":
    main()
