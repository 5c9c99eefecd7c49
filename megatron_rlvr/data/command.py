"""The command ``rlvr data``: published sets as files of this project; overlap of training and evaluation."""

import sys
from collections.abc import Sequence

from megatron_rlvr.command_line import Parser, path
from megatron_rlvr.data.overlap import as_json, describe, find_overlap
from megatron_rlvr.data.published import FRAMES, SETS, prepare, report
from megatron_rlvr.data.records import encodable
from megatron_rlvr.data.rows import DataError

DESCRIPTION = """\
Prepare problem sets, and compare those to train on with those to evaluate on.

    rlvr data prepare SET FILE ... --out OUT.jsonl    a published set as a file of this project
    rlvr data overlap TRAIN ... --sets SET ...        problems that are in both
"""

_PREPARE = """\
Convert the published files of a problem set into a file of this project: JSON lines of id, prompt, answer, source.

    rlvr data prepare math500 test.jsonl --out data/math500.jsonl
    rlvr data prepare dapo-math-17k dapo-math-17k.parquet --frame paper --out data/dapo_math_17k.jsonl

Nothing is downloaded (`hf download --repo-type dataset NAME` gets a data set of Hugging Face). Instructions around
DAPO's problems are removed, and repeated rows are omitted. The line at the end says how many problems were expected
and found. DAPO's 1.8 million rows take one to two minutes and 4.5 GB of memory.

The sets, and files that have them:
"""

_OVERLAP = """\
Report the problems of sets that are in training files as well: with the same text, with the same text apart from case,
LaTeX spacing, punctuation, brackets and white space, and with any 13 consecutive words in common. Operators, signs and
relations count: 12 + 3 and 12 - 3 are different.

    rlvr data overlap data/dapo_math_17k.jsonl --sets data/aime24.jsonl data/math500.jsonl
"""


def main(arguments: Sequence[str], program: str) -> int:
    """Prepare or compare, and return exit status 0; exits with 2 and one line on stderr if that is impossible.

    Args:
        program: Name of the command in messages.
    """
    parser = _parser(program)
    options = parser.parse_args(list(arguments))
    try:
        if options.action == "overlap":
            found = find_overlap(options.train, options.sets)
            sys.stdout.write((as_json(found) if options.json else describe(found)) + "\n")
            return 0
        frame = FRAMES.get(options.frame, encodable(options.frame, "--frame", "rlvr data prepare"))
        if "{problem}" not in frame:
            parser.error(
                f"--frame={options.frame!r}: no {{problem}} in it; write {{problem}} where the problem belongs, "
                f"or give {' or '.join(FRAMES)}"
            )
        keys = {"problem_key": options.problem_key, "answer_key": options.answer_key}
        if options.out.exists() and not options.out.is_file():
            parser.error(f"--out {options.out}: a folder or device; give a .jsonl file")
        counts = prepare(options.set, options.files, options.out, frame=frame, **keys)
    except (DataError, OSError) as error:
        parser.error(str(error))
    sys.stdout.write(report(options.set, options.out, counts) + "\n")
    return 0


def _parser(program: str) -> Parser:
    parser = Parser(program, description=DESCRIPTION)
    actions = parser.add_subparsers(dest="action", required=True, metavar="prepare | overlap")
    listing = "\n".join(f"    {name:<14} {file}" for name, each in SETS.items() for file in each.files)
    one = actions.add_parser("prepare", description=_PREPARE + listing, help="convert a published set")
    one.add_argument("set", choices=list(SETS), metavar="SET", help="name of the set, from the list above")
    one.add_argument("files", type=path, nargs="+", metavar="FILE", help="published file: .parquet or .jsonl")
    one.add_argument("--out", type=path, required=True, metavar="OUT", help=".jsonl file; an existing one is replaced")
    one.add_argument(
        "--frame", default="none", metavar="TEXT", help="none, paper, or text around each {problem} (default: none)"
    )
    one.add_argument("--problem-key", metavar="COLUMN", help="column of the problem, if not one of the usual names")
    one.add_argument("--answer-key", metavar="COLUMN", help="column of the answer, if not one of the usual names")
    other = actions.add_parser("overlap", description=_OVERLAP, help="problems that are in both")
    other.add_argument("train", type=path, nargs="+", metavar="TRAIN", help="files to train on")
    other.add_argument("--sets", type=path, nargs="+", required=True, metavar="SET", help="files to evaluate on")
    other.add_argument("--json", action="store_true", help="print everything that is found as JSON")
    return parser
