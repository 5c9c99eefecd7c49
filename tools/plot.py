"""Plot metrics of runs over their steps.

    tools/plot.py runs/quickstart --output docs/quickstart.svg
    tools/plot.py runs/forking runs/all_tokens --metrics reward/accuracy rollout/response_tokens_mean --output both.png

One panel a metric, one line a run, with every step as a dot. Needs matplotlib (pip install matplotlib). The format of
the picture follows the suffix of --output: svg, png, pdf.
"""

import sys
from pathlib import Path

from megatron_rlvr.command_line import Parser, path
from megatron_rlvr.errors import one_line
from megatron_rlvr.input_files import BadFileError, decode, parse_json, read_lines


def main() -> int:
    parser = Parser("plot.py", description=__doc__)
    parser.add_argument("runs", nargs="+", type=path, help="run folders (run.dir)")
    parser.add_argument("--metrics", nargs="+", default=["reward/accuracy"], help="keys of metrics.jsonl")
    parser.add_argument("--output", type=path, required=True, help="file of the picture")
    options = parser.parse_args()
    try:
        draw({folder.name: read(folder) for folder in options.runs}, options.metrics, options.output)
    except (OSError, ValueError) as error:
        print(f"plot.py: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def read(folder: Path) -> list[dict[str, float]]:
    """Return the metrics of each step. Raises: OSError, ValueError if the folder has none."""
    file, steps = folder / "metrics.jsonl", []
    try:
        for number, line in read_lines(file):
            if line.endswith(b"\n"):  # the last line of a run that was killed may be incomplete
                steps.append(_metrics_of(line, number))
    except BadFileError as error:
        raise ValueError(f"{file}{f', line {error.line}' if error.line else ''} cannot be read ({error})") from None
    if not steps:
        raise ValueError(f"{file} is empty; give the folder of a run that has finished a step")
    return steps


def _metrics_of(line: bytes, number: int) -> dict[str, float]:
    """Return the numbers in a line. Raises BadFileError if it is no object, or has no step."""
    try:
        values = parse_json(decode(line))
    except BadFileError as error:
        raise BadFileError(str(error), number) from None
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        raise BadFileError("no metrics of a step", number)
    return {key: value for key, value in values.items() if isinstance(value, int | float)}


def draw(runs: dict[str, list[dict[str, float]]], metrics: list[str], output: Path) -> None:
    """Draw a panel for each metric and write the picture.

    Args:
        runs: {name of the run: its metrics, one dict a step}.
        metrics: Keys to draw; a step without the key has no dot.
        output: File of the picture.

    Raises: ValueError if no run has a metric.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "plot"  # the same metrics give the same bytes
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        len(metrics), 1, sharex=True, squeeze=False, figsize=(7, 2.6 * len(metrics)), layout="constrained"
    )
    for metric, panel in zip(metrics, panels[:, 0], strict=True):
        known = sorted({key for steps in runs.values() for step in steps for key in step})
        if metric not in known:
            raise ValueError(f"--metrics {metric}: no run has it; choose from {', '.join(known)}")
        for name, steps in runs.items():
            points = [(step["step"], step[metric]) for step in steps if metric in step]
            panel.plot(*zip(*points, strict=True), marker=".", label=name)
        panel.set_ylabel(metric)
        panel.grid(alpha=0.3)
    panels[-1, 0].set_xlabel("step")
    if len(runs) > 1:
        panels[0, 0].legend()
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)


if __name__ == "__main__":
    sys.exit(main())
