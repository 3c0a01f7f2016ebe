"""What narrow wires cost in learning: ``python benchmarks/wires.py [WIRE ...] [--optimizer muon] [--fragments N]``.

The built-in recipe ``gpt`` trains under ``diloco:20`` with 4 workers over each wire, in one process on a virtual clock,
which gives the bits of a real team. `muon` trains the matrices of its blocks with torch.optim.Muon (MuLoCo,
arXiv:2505.23725), scaled to the rate of AdamW, which trains the rest. `--fragments` sends the model in so many parts,
one after the other. A run's figures replace its earlier ones in benchmarks/results/wires.json; those of fewer steps, by
`--steps`, are only shown.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # run as a file, Python would look for modules in benchmarks/ itself

import instep  # noqa: E402
from benchmarks.lockstep import machine  # noqa: E402
from instep.clock.times import WorkerTimes  # noqa: E402
from instep.recipe import parse  # noqa: E402
from instep.recipe_files import read  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "wires.json"
WIRES = ("float32", "bfloat16", "int8", "int4")
WORKERS = 4
KEPT = ("held_out", "bytes_sent", "versions", "digest")


def optimizer(name: str, table: dict[str, Any]) -> Any:
    """The recipe's own ("adamw"), or Muon beside it."""
    own = table["optimizer"]
    if name == "adamw":
        return own
    muon = {"lr": own["args"]["lr"], "weight_decay": own["args"]["weight_decay"], "adjust_lr_fn": "match_rms_adamw"}
    rest = {"use": "torch.optim:AdamW", "args": own["args"]}
    return [
        {"parameters": ["*norm*", "*.bias", "embedding*"], **rest},
        {"parameters": "*", "use": "torch.optim:Muon", "args": muon},
    ]


def measure(wire: str, optimizer_name: str, fragments: int, steps: int | None) -> dict[str, Any]:
    """One run."""
    table = read("gpt")
    changes = {"rule": f"diloco:20,wire={wire},fragments={fragments}", "optimizer": optimizer(optimizer_name, table)}
    recipe, _ = parse({**table, **changes, **({} if steps is None else {"steps": steps})})
    times = WorkerTimes.constant(0.1)
    result = instep.simulate(recipe, instep.Cluster(WORKERS, times, merge_s=0.0, collective=False))
    return {key: result[key] for key in KEPT}


def main() -> None:
    """Measures, saves after each run, prints each beside float32."""
    options = argparse.ArgumentParser()
    options.add_argument("wires", nargs="*", default=WIRES, metavar="WIRE", help=", ".join(WIRES))
    options.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    options.add_argument("--fragments", type=int, default=1)
    options.add_argument("--steps", type=int, help="global batches, to try it; by default the recipe's")
    given = options.parse_args()
    known = json.loads(RESULT.read_text())["runs"] if RESULT.exists() and given.steps is None else {}
    for wire in given.wires:
        parts = f", {given.fragments} fragments" if given.fragments > 1 else ""
        row = measure(wire, given.optimizer, given.fragments, given.steps)
        known[f"{given.optimizer}, {wire}{parts}"] = row
        plain = known.get(f"{given.optimizer}, float32", row)
        print(
            f"{given.optimizer:<6}{wire:<9}{row['held_out']:>8.4f}{row['held_out'] / plain['held_out'] - 1:>+8.2%}"
            f"{row['bytes_sent'] / 1e9:>8.3f} GB, {plain['bytes_sent'] / row['bytes_sent']:.2f}x fewer",
            flush=True,
        )
        if given.steps is None:
            RESULT.write_text(json.dumps({"machine": machine(), "workers": WORKERS, "runs": known}, indent=1) + "\n")


if __name__ == "__main__":
    main()
