"""What the built-in recipes reach: ``python benchmarks/recipes.py [--untimed] [RECIPE ...]``.

Each recipe trains twice, with 2 workers and with 1, and both runs must come to one digest. Shown are its figures; a
recipe's replace its earlier ones in benchmarks/results/recipes.json. `distil` learns from the run of `gpt` before it;
`lora` and `sft` go on with the model that `hf` leaves. With --untimed no seconds are kept: for a busy machine.
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
from instep.recipe_files import names_of_recipes, read  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "recipes.json"


BASED_ON = {"distil": "gpt", "lora": "hf", "sft": "hf"}

UNTIMED = "--untimed"


def measure(name: str, folder: Path, *, timed: bool) -> dict[str, Any]:
    """Trains twice. Raises SystemExit where the digests differ."""
    table = read(name)
    if name in BASED_ON:
        base = folder / f"{BASED_ON[name]}-2"
        if name == "distil":
            table["objective"]["args"]["teacher"]["args"]["run"] = str(base)
        else:
            table["model"]["args"]["folder"] = str(base / "artifacts" / "hf")
    recipe, _ = parse(table)
    runs = [instep.train(recipe, team=instep.Team(workers=w), out=folder / f"{name}-{w}") for w in (2, 1)]
    if runs[0].digest != runs[1].digest:
        raise SystemExit(f"recipe '{name}' has other digests with 2 workers and with 1: contract C1 is broken.")
    result = runs[0].result
    return {
        "digest": runs[0].digest,
        "wall_s": {"2 workers": runs[0].result["wall_s"], "1 worker": runs[1].result["wall_s"]} if timed else None,
        "held_out": result["held_out"],
        "bits_per_byte": result["bits_per_byte"],
        "figures": (result["artifacts"] or {}).get("figures"),
    }


def main() -> None:
    """Measures, prints, saves after each recipe."""
    known = json.loads(RESULT.read_text())["recipes"] if RESULT.exists() else {}
    asked = [word for word in sys.argv[1:] if word != UNTIMED] or names_of_recipes()
    needed = {BASED_ON[name] for name in asked if name in BASED_ON}
    names = sorted({*asked, *needed}, key=lambda name: (name in BASED_ON, name not in needed, name))
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for name in names:
            known[name] = measure(name, Path(folder), timed=UNTIMED not in sys.argv)
            print(name, json.dumps(known[name], indent=1), flush=True)
            RESULT.write_text(json.dumps({"machine": machine(), "recipes": known}, indent=1) + "\n")


if __name__ == "__main__":
    main()
