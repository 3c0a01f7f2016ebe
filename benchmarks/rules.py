"""What each update rule learns from equal data: ``python benchmarks/rules.py [RULE ...]``.

The built-in recipe ``gpt`` trains for real with 4 workers under each rule, all presets at their defaults unless rules
are named. Shown are the held-out objective, versions, bytes and staleness; a rule's figures replace its earlier ones in
benchmarks/results/rules.json. Where workers don't wait for each other, staleness and with it the objective depend on
the machine.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # run as a file, Python would look for modules in benchmarks/ itself

import instep  # noqa: E402
from benchmarks.lockstep import machine  # noqa: E402
from instep.recipe import parse  # noqa: E402
from instep.recipe_files import read  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "rules.json"
WORKERS = 4
RULES = (
    "synchronous", "backup_workers", "bounded_staleness", "softsync", "asynchronous", "delay_compensated",
    "local_sgd", "post_local_sgd", "diloco", "diloco:20", "async_diloco",
)  # fmt: skip
KEPT = ("held_out", "bits_per_byte", "versions", "bytes_sent", "staleness_mean", "staleness_max", "wall_s", "digest")


def measure(rule: str) -> dict[str, Any]:
    """One run, in a folder that is thrown away."""
    recipe, _ = parse({**read("gpt"), "rule": rule})
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        run = instep.train(recipe, team=instep.Team(workers=WORKERS), out=Path(folder, "run"))
    return {key: run.result[key] for key in KEPT}


def table(rules: dict[str, dict[str, Any]]) -> str:
    """The figures of all rules, plain; bytes as a share of those of the synchronous rule."""
    whole = rules.get("synchronous", {}).get("bytes_sent")
    lines = [
        f"{'rule':<20}{'held out':>9}{'bits/byte':>10}{'versions':>9}{'GB sent':>9}{'fewer by':>9}"
        f"{'staleness mean':>15}{'max':>5}{'seconds':>9}"
    ]
    for name in sorted(rules, key=RULES.index if rules.keys() <= set(RULES) else None):
        row = rules[name]
        fewer = f"{whole / row['bytes_sent']:.1f}x" if whole else ""
        lines.append(
            f"{name:<20}{row['held_out']:>9.4f}{row['bits_per_byte']:>10.4f}{row['versions']:>9}"
            f"{row['bytes_sent'] / 1e9:>9.2f}{fewer:>9}{row['staleness_mean']:>15.2f}{row['staleness_max']:>5}"
            f"{row['wall_s']:>9.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures, saves after each rule, prints the table."""
    known = json.loads(RESULT.read_text())["rules"] if RESULT.exists() else {}
    for rule in sys.argv[1:] or RULES:
        known[rule] = measure(rule)
        print(table({rule: known[rule]}), file=sys.stderr, flush=True)
        RESULT.write_text(json.dumps({"machine": machine(), "workers": WORKERS, "rules": known}, indent=1) + "\n")
    print(table(known))


if __name__ == "__main__":
    main()
