"""The command ``rlvr convert``: Hugging Face folders to megatron-core checkpoints, and back."""

import os
import sys
from collections.abc import Sequence

from megatron_rlvr.command_line import Parser, path, small_int
from megatron_rlvr.distributed import environment

DESCRIPTION = """\
Converts a model between a Hugging Face folder and a megatron-core checkpoint (torch_dist), or a GGUF file to a folder.

    rlvr convert from-gguf FILE OUT
    rlvr convert to-megatron HF_DIR OUT [--tensor 8 --pipeline 4 --expert 2] [--verify]
    rlvr convert to-hf CKPT OUT [--shard-size 5] [--verify]

Runs in one process on the CPU, with one parameter in memory at a time. In case of an error, one line is printed, the
exit status is 2, and nothing is left at OUT.
"""

_FROM_GGUF = """\
Write the model of a GGUF file (llama.cpp's format) as a Hugging Face folder, as `model.path: FILE.gguf` does beside the
file. Quantised weights become float32 numbers, floats keep their type. Needs the package gguf.
"""

_TO_MEGATRON = """\
Convert the model of a Hugging Face folder to a megatron-core checkpoint (torch_dist).

A checkpoint does not depend on a layout: any layout can load it. --tensor, --pipeline and --expert only check, before
the conversion, that the model can be sharded in that layout. Configuration, tokenizer and generation settings are
copied to OUT/hugging_face.
"""

_TO_HF = """\
Convert the model of a megatron-core checkpoint (torch_dist), saved in any layout, to a Hugging Face folder.

Configuration, tokenizer and generation settings are copied from CKPT/hugging_face. Other tensors of the checkpoint,
such as an optimizer's, are ignored.
"""


def main(arguments: Sequence[str], program: str) -> int:
    """Convert, and return exit status 0; exits with 2 and one line on stderr if that is impossible.

    Args:
        program: Name of the command in messages.
    """
    parser = _parser(program)
    options = parser.parse_args(list(arguments))
    if options.direction == "to-megatron" and min(options.tensor, options.pipeline, options.expert) < 1:
        parser.error("--tensor, --pipeline and --expert must be at least 1")
    if options.direction == "to-hf" and not 0 < options.shard_size <= 1e6:
        parser.error(f"--shard-size {options.shard_size}: not between 0 and 1e6; give the size in GB")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tolerance of --verify is for fp32 on the CPU
    environment.quiet_libraries()
    from rich.console import Console
    from rich.progress import track

    from megatron_rlvr.convert.conversion import (
        check_layout,
        check_new_folder,
        errors_in_one_line,
        to_hugging_face,
        to_megatron,
    )
    from megatron_rlvr.convert.verification import verify
    from megatron_rlvr.hf.gguf import unpack
    from megatron_rlvr.hf.headers import list_names

    console = Console(stderr=True)
    with errors_in_one_line(options.out):
        if options.direction == "from-gguf":
            check_new_folder(options.out)
            unpack(options.source, options.out)
            return 0
        if options.direction == "to-megatron":
            check_layout(options.source, options.tensor, options.pipeline, options.expert)
            skipped = to_megatron(options.source, options.out, lambda rows: track(rows, "converting", console=console))
            if skipped:
                sys.stderr.write(f"skipped: {list_names(skipped)}, which no next-token logit depends on\n")
            models = options.source, options.out
        else:
            size = int(options.shard_size * 1e9)
            to_hugging_face(options.source, options.out, size, lambda rows: track(rows, "converting", console=console))
            models = options.out, options.source
        if options.verify:
            Console(highlight=False).print(verify(*models), soft_wrap=True, markup=False)
    return 0


def _parser(program: str) -> Parser:
    parser = Parser(program, description=DESCRIPTION)
    directions = parser.add_subparsers(dest="direction", required=True, metavar="from-gguf | to-megatron | to-hf")
    unpacking = directions.add_parser("from-gguf", description=_FROM_GGUF, help="GGUF file to a Hugging Face folder")
    unpacking.add_argument("source", type=path, metavar="FILE", help="file of llama.cpp's format")
    unpacking.add_argument("out", type=path, metavar="OUT", help="folder to write; must not exist")
    forth = directions.add_parser("to-megatron", description=_TO_MEGATRON, help="to a megatron-core checkpoint")
    back = directions.add_parser("to-hf", description=_TO_HF, help="make a Hugging Face folder")
    forth.add_argument("source", type=path, metavar="HF_DIR", help="folder with config.json and safetensors")
    back.add_argument("source", type=path, metavar="CKPT", help="folder with metadata.json and hugging_face/")
    for each in (forth, back):
        each.add_argument("out", type=path, metavar="OUT", help="folder to write; must not exist")
        each.add_argument("--verify", action="store_true", help="then compare the logits of both models (loads both)")
    for flag in ("tensor", "pipeline", "expert"):
        forth.add_argument(
            f"--{flag}",
            type=small_int,
            default=1,
            metavar="N",
            help=f"check that the model fits {flag}-parallel size N",
        )
    back.add_argument(
        "--shard-size", type=float, default=5.0, metavar="GB", help="maximum size of a safetensors file (default: 5)"
    )
    return parser
