"""What `make prove` has found is of a commit of the project's past, and all that is claimed of it."""

from __future__ import annotations

import json
import subprocess

import pytest

from support.proved import RESULTS, ROOT, Claim, claims, falls_short, git

pytestmark = pytest.mark.processes


def test_campaigns_are_of_a_commit_before_and_found_what_is_claimed_of_them() -> None:
    try:
        if git("rev-parse", "--is-shallow-repository") == "true":
            pytest.skip("a shallow clone does not know the commits before")
        before = git("rev-list", "HEAD").splitlines()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"the commits before are not known here: {error}")
    texts = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    claimed = [claim for path in texts for claim in claims(path.read_text(), path.name)]
    files = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    assert {claim.name for claim in claimed if claim.cases} <= {path.stem for path in RESULTS.glob("*.json")}
    assert [wrong for found in files if "proves" in found for wrong in falls_short(claimed, found, before)] == []


@pytest.mark.pure
def test_a_claim_names_its_file_in_its_paragraph_or_row() -> None:
    text = """Of 1,234 cases none.

Hosts gave one digest in
1,096 cases ([all](../benchmarks/results/hosts.json)), of 8 models.

| what | found |
| --- | --- |
| links | 40 faults ([figures](../benchmarks/results/links.json)) |
| speed | 1.04 ([figures](../benchmarks/results/speed.json)) |
"""
    assert list(claims(text, "a.md")) == [
        Claim("a.md", "hosts", 1096), Claim("a.md", "links", 40), Claim("a.md", "speed", 0)
    ]  # fmt: skip


@pytest.mark.pure
@pytest.mark.parametrize(
    ("claimed", "commit", "held", "wrong"),
    [
        (2, "b", True, ""),
        (3, "b", True, "claims 3 cases of hosts, which has 2"),
        (0, "b", True, "claims 0 cases of hosts"),
        (2, "b and changes", True, "commit b and changes is none before"),
        (2, "z", True, "commit z is none before"),
        (2, "b", False, "does not hold for {'workers': 3, 'held': False}"),
        (None, "b", True, "nothing is claimed of it"),
    ],
)
def test_what_falls_short_is_told(claimed: int | None, commit: str, held: bool, wrong: str) -> None:
    found = {
        "proves": "hosts", "commit": commit, "cases": [{"workers": 2, "held": True}, {"workers": 3, "held": held}]
    }  # fmt: skip
    told = falls_short([] if claimed is None else [Claim("a.md", "hosts", claimed)], found, ["c", "b", "a"])
    assert len(told) == bool(wrong)
    assert wrong in "".join(told)
