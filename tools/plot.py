"""Plot metrics of runs over their steps.

    tools/plot.py runs/quickstart --output docs/quickstart.svg
    tools/plot.py runs/forking runs/all_tokens --metrics reward/accuracy rollout/response_tokens_mean --output both.png

One panel a metric, one line a run, with every step as a dot. Needs matplotlib (pip install matplotlib). The format of
the picture follows the suffix of --output: svg, png, pdf.
"""

import argparse
import json
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders (run.dir)")
    parser.add_argument("--metrics", nargs="+", default=["reward/accuracy"], help="keys of metrics.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="file of the picture")
    options = parser.parse_args()
    try:
        draw({folder.name: read(folder) for folder in options.runs}, options.metrics, options.output)
    except (OSError, ValueError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        return 2
    return 0


def read(folder: Path) -> list[dict[str, float]]:
    """Return the metrics of each step. Raises: OSError, ValueError if the folder has none."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    if not lines:
        raise ValueError(f"{folder}/metrics.jsonl is empty; give the folder of a run that has finished a step")
    return [json.loads(line) for line in lines]


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
