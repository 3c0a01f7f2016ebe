"""How soon all train on after a host was cut off: ``python benchmarks/cuts.py``.

The hosts are those of the tests (`tests/support/hosts.py`), namespaces of this machine on a bridge. A tiny model is
trained in step by a worker on each, with steps of about 25 ms, and a host, the first in its turn, is cut off for 1, 5
and 8 s, by default in 5 cuts of each length. Printed are the seconds from the end of the cut to the next update that
all workers have made together, as the tape has it within 30 ms. The run must not load a checkpoint or start a process,
and have the digest of one worker alone. Needs root. The result goes to benchmarks/results/cuts.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # run as a file, Python would look for modules in benchmarks/ itself
sys.path.append(str(ROOT / "tests"))

from benchmarks.lockstep import commit, machine  # noqa: E402
from support.cuts import LEASE_S, CutRun  # noqa: E402
from support.hosts import Hosts  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "cuts.json"


class Quick(CutRun):
    """A run with short steps."""

    pause_s = 0.005


def measured(hosts: int, lengths: list[float], cuts: int) -> dict[str, dict[str, float | list[float]]]:
    """By length of the cut, the seconds from its end to the next update of all."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, Hosts(hosts, Path(folder)) as made:
        run = Quick(made)
        run.begin()
        each = {length: [run.cut(number % hosts, length) for number in range(1, cuts + 1)] for length in lengths}
        run.check()
    return {
        f"{length:g} s": {
            "median_s": round(statistics.median(found), 3),
            "most_s": round(max(found), 3),
            "each_s": [round(seconds, 3) for seconds in found],
        }
        for length, found in each.items()
    }


def main() -> None:
    """Measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--cuts", type=int, default=5, help="of each length")
    parser.add_argument("--lengths", type=float, nargs="+", default=[1.0, 5.0, 8.0], help="in seconds")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it has started ends too
    found = {}
    for hosts in given.hosts:
        found[f"{hosts} hosts"] = measured(hosts, given.lengths, given.cuts)
        print(hosts, "hosts", json.dumps(found[f"{hosts} hosts"]), flush=True)
    about = {"machine": machine(), "commit": commit(), "lease_s": LEASE_S, "load": os.getloadavg()}
    given.out.write_text(json.dumps({**about, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
