"""Work of the host besides the arithmetic of GPUs: CPU seconds and peak memory, from 1 % to the paper's whole size.

    OMP_NUM_THREADS=1 python benchmarks/host.py [--share 0.01] [--only sync groups] [--json FILE]

The paper's size is 512 prompts x 16 responses of up to 20,480 tokens a step. Each module ``host_*.py`` beside this one
measures a part, with scripted servers and ranks on this machine, in a process of its own: it has a function

    def rows(share: float) -> list[dict]:    # share of the paper's size, 0.01 to 1

of rows with ``name``, ``size`` (in words), ``cpu_seconds`` and ``peak_mb`` as measured, and where it can be said
``seconds_at``: {ranks: seconds that GPUs wait for at the paper's size}. CPU seconds do not depend on other work on the
machine, unlike wall-clock seconds.
"""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

AT_RANKS = (32, 256, 1024)
_PREFIX = "host_"


def parts() -> list[str]:
    """Return the names of all parts."""
    return sorted(path.stem.removeprefix(_PREFIX) for path in Path(__file__).parent.glob(f"{_PREFIX}*.py"))


def measure(part: str, share: float) -> list[dict[str, Any]]:
    """Return the rows of a part, measured in a new process."""
    command = [sys.executable, __file__, "--share", str(share), "--only", part, "--here"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return [{"name": part, "size": f"failed with status {done.returncode}", "cpu_seconds": None, "peak_mb": None}]
    return json.loads(done.stdout.splitlines()[-1])


def line(row: dict[str, Any]) -> str:
    """Return a line of the table."""
    at = {int(ranks): seconds for ranks, seconds in (row.get("seconds_at") or {}).items()}
    seconds = "".join(f"{number(at.get(ranks)):>10}" for ranks in AT_RANKS)
    return f"{row['name']:<40} {row['size']:<44} {number(row['cpu_seconds']):>9} {number(row['peak_mb']):>9}{seconds}"


def number(value: float | None) -> str:
    """Return a number with three digits, or a dash."""
    return "-" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.01, help="share of the paper's size (default 0.01)")
    parser.add_argument("--only", nargs="+", choices=parts(), default=parts(), metavar="PART", help=", ".join(parts()))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not 0 < options.share <= 1:
        parser.error(f"--share {options.share}: not above 0 and at most 1; give a share such as 0.01")
    if options.here:
        module = importlib.import_module(_PREFIX + options.only[0])
        print(json.dumps(module.rows(options.share)))
        return
    header = {"name": "part", "size": f"measured size (share {options.share:g})"}
    at = "".join(f"{f's at {ranks}':>10}" for ranks in AT_RANKS)
    print(f"{header['name']:<40} {header['size']:<44} {'CPU s':>9} {'peak MB':>9}{at}")
    found = []
    for part in options.only:
        for row in measure(part, options.share):
            found.append(row)
            print(line(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
