"""Campaigns of `make prove`: tests that are marked `prove`, each of which saves what it found, a line for each case.

What the README and docs/ claim of one names its file and how many cases it had: "96 cases ([all](.../NAME.json))".
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instep.record.computed_by import libraries, processor

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

_CLAIM = re.compile(r"(?<![\d,.])(\d[\d,]*) (?:cases|faults)\b")


def missed(cases: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those that were not as they must be."""
    return [case for case in cases if not case["held"]]


def save(name: str, cases: Sequence[Mapping[str, Any]], *, seed: int, began: float, **more: Any) -> None:
    """Writes a campaign's file. cases: each with `held`, whether it was as it must be. began: of `time.monotonic`."""
    commit = git("rev-parse", "HEAD") + (" and changes" if git("status", "--porcelain", "--", "src") else "")
    found = {
        "proves": name,
        "commit": commit,
        "seed": seed,
        "versions": libraries(),
        "processor": processor(),
        "seconds": round(time.monotonic() - began),
        **more,
    }
    lines = ",\n  ".join(json.dumps(case) for case in cases)
    head = json.dumps(found, indent=1).removesuffix("\n}")
    (RESULTS / f"{name}.json").write_text(f'{head},\n "cases": [\n  {lines}\n ]\n}}\n')


def git(*arguments: str) -> str:
    """What git says of the project."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@dataclass(frozen=True)
class Claim:
    """What a text says of a campaign. `cases` is 0 where it names none."""

    where: str
    name: str
    cases: int


def claims(text: str, where: str) -> Iterator[Claim]:
    """Those of a text in Markdown: each in the paragraph, or the row of a table, that names a file of results."""
    for part in re.split(r"\n\s*\n|\n(?=\|)", text):
        for name in re.findall(r"benchmarks/results/(\w+)\.json", part):
            counts = [int(count.replace(",", "")) for count in _CLAIM.findall(part)]
            yield Claim(where, name, max(counts, default=0))


def falls_short(claimed: Sequence[Claim], found: Mapping[str, Any], held_by: Sequence[str]) -> list[str]:
    """What is wrong with a campaign's file, beside what is claimed. held_by: the present commit and those before."""
    name, cases = found["proves"], found["cases"]
    wrong = [] if found["commit"] in held_by else [f"{name}: commit {found['commit']} is none before the present one"]
    wrong += [f"{name}: it does not hold for {case}" for case in missed(cases)]
    own = [claim for claim in claimed if claim.name == name]
    if not own:
        wrong.append(f"{name}: nothing is claimed of it")
    return wrong + [
        f"{claim.where} claims {claim.cases} cases of {name}, which has {len(cases)}"
        for claim in own
        if not 0 < claim.cases <= len(cases)
    ]
