"""The report of runs: one HTML file that needs no network, with curves, settings, rollouts and forking tokens.

Nothing from a run is executed: data is JSON in a block that is no script, in which `<` is written as an escape; the
page makes text nodes of it; and its content security policy only runs the two scripts of this package, by their hashes.
The plots are uPlot's (MIT licence, page/uPlot.LICENSE).
"""

import base64
import hashlib
import html
import json
import logging
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rlvr import __version__, atomic
from megatron_rlvr.analysis.curves import curves
from megatron_rlvr.analysis.runs import RunFolder, read_runs
from megatron_rlvr.analysis.shown_rollouts import MOST_BYTES, show_rollouts
from megatron_rlvr.analysis.token_means import TokenMean, TokenMeans
from megatron_rlvr.config.describe import describe_settings
from megatron_rlvr.errors import InputError
from megatron_rlvr.input_files import read_json_object
from megatron_rlvr.recording.files import OnError, RecordingError, read_recorded

logger = logging.getLogger(__name__)

REPORT, ANALYSES = "report.html", "analysis"
"""Names in a run folder: the report, and the folder of the results of `rlvr analyze`."""

_LISTED, _LEAST, _ROWS = 50, 10, 100
_ORDER = (
    *("entropy", "forking_tokens", "sure_tokens", "entropy_by_step", "temperatures", "top_overlap", "entropy_change"),
    *("parameters", "gradient"),
)


class ReportError(InputError):
    """A report that cannot be made from what is in a run folder."""


def write_report(folders: Sequence[Path], output: Path, *, least: int = _LEAST, most_bytes: int = MOST_BYTES) -> None:
    """Write the report of runs.

    Args:
        folders: Run folders.
        output: File of the page, which is replaced as a whole.
        least: Fewest occurrences of a token in the table of forking tokens.
        most_bytes: Bytes of recorded responses in the page, about.

    A file of recorded responses that cannot be read is left out, and a warning names it.

    Raises: RunError, ReportError if a folder cannot be read; OSError if the page cannot be written.
    """
    runs = read_runs(list(folders))
    unreadable: dict[str, None] = {}

    def leave_out(error: RecordingError) -> None:
        unreadable[str(error)] = None

    rollouts = show_rollouts(runs, most_bytes, leave_out)
    data = {
        "version": __version__,
        "parts": ["runs", "curves", "rollouts", "tokens", "analyses"],
        "curves": curves(runs),
        "runs": [
            {
                "name": run.name,
                "folder": str(run.folder),
                "words": _words(run),
                "settings": run.settings_text,
                "fraction": _fraction(run),
                "recordedSteps": recorded,
                "shownSteps": shown,
                "forks": _forks(run, least, leave_out),
                "analyses": _analyses(run.folder),
            }
            for run, recorded, shown in zip(runs, rollouts.recorded_steps, rollouts.shown_steps, strict=True)
        ],
        "texts": rollouts.texts,
        "responses": rollouts.responses,
        "least": least,
    }
    for error in unreadable:
        logger.warning("the report leaves out a file: %s", error)
    atomic.write_text(output, page(", ".join(run.name for run in runs), data))


def page(title: str, data: dict[str, Any], command: str = "rlvr report") -> str:
    """Return the HTML of a report.

    Args:
        data: Data of the parts that ``data["parts"]`` names, in the order of the tabs.
        command: Command that writes it, for its heading.
    """
    scripts = [_asset("uPlot.iife.min.js"), _asset("report.js")]
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    # A block of JSON ends at the first `</script`, whatever surrounds it.
    content = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return _asset("report.html").format(
        policy=f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'",
        title=html.escape(f"{command}: {title}"),
        heading=html.escape(command),
        styles=_asset("uPlot.min.css") + _asset("report.css"),
        data=content.encode("utf-8", "replace").decode("utf-8"),
        plots=scripts[0],
        script=scripts[1],
    )


def _words(run: RunFolder) -> list[tuple[str, str]]:
    steps = [step for step in run.steps if step > 0]
    so_far = [("so far", f"{len(steps)} steps, the last is {steps[-1]}" if steps else "no training step")]
    if run.settings is None:
        return [*so_far, ("settings", "of another version of rlvr, shown below as they are")]
    return [*describe_settings(run.settings).items(), *so_far]


def _fraction(run: RunFolder) -> float:
    settings = run.settings
    return 0.2 if settings is None or settings.selection.keep != "top" else settings.selection.fraction


def _forks(run: RunFolder, least: int, on_error: OnError) -> dict[str, Any]:
    """Tokens of highest and lowest mean entropy over all recorded responses of a run."""
    means, texts, tokens = TokenMeans(), dict[int, str](), 0
    for response in read_recorded(run.folder, on_error=on_error):
        means.add(response.token_ids, response.entropy, response.selected)
        tokens += len(response.token_ids)
        ids, first = np.unique(response.token_ids, return_index=True)
        for token, place in zip(ids.tolist(), first.tolist(), strict=True):
            texts.setdefault(token, response.texts[place])
    most, fewest = means.extremes(_LISTED, least, texts.__getitem__)
    return {"tokens": tokens, "most": [_row(mean) for mean in most], "fewest": [_row(mean) for mean in fewest]}


def _analyses(folder: Path) -> list[dict[str, Any]]:
    """Results that `rlvr analyze` has written into a run folder, with the first rows of their tables."""
    found = []
    for path in sorted((folder / ANALYSES).glob("*.json"), key=_place):
        result = read_json_object(path, ReportError, "remove the file, or run the analysis again")
        if not isinstance(result.get("rows"), list):
            raise ReportError(f"{path} is no result of rlvr analyze; remove the file")
        found.append(result | {"rows": result["rows"][:_ROWS], "allRows": len(result["rows"])})
    return found


def _place(path: Path) -> tuple[int, str]:
    """Order of a result on the page; the name of one on a set of problems ends with that of the set."""
    name = "temperatures" if path.stem.startswith("temperatures_") else path.stem
    return _ORDER.index(name) if name in _ORDER else len(_ORDER), path.stem


def _row(mean: TokenMean) -> dict[str, Any]:
    return {
        "text": mean.text,
        "id": mean.token_id,
        "count": mean.count,
        "entropy": round(mean.entropy, 4),
        "selected": round(mean.selected, 4),
    }


def _asset(name: str) -> str:
    return (resources.files("megatron_rlvr.analysis") / "page" / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
