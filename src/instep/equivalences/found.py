"""What a check comes to: plain data, which a program, a table and a document of JSON are made from. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

SCHEMA = 1
"""The version of the document."""

Verdict = Literal["proved", "refuted", "not run"]

UNKNOWN = "The cause is unknown."
"""What is said where nothing is known of why two computations part."""


@dataclass(frozen=True)
class Compared:
    """How much was compared; 0 and () where that is not what the equivalence is about.

    tensors: different ones, each in every step. steps: of training. workers: the teams' sizes. samples: that were read.
    """

    tensors: int = 0
    steps: int = 0
    workers: tuple[int, ...] = ()
    samples: int = 0

    def __str__(self) -> str:
        workers = "/".join(map(str, self.workers))
        parts = [_count(self.tensors, "tensor"), _count(self.samples, "sample"), _count(self.steps, "step")]
        parts.append(f"{workers} worker{'' if workers == '1' else 's'}" if workers else "")
        return ", ".join(filter(None, parts))


@dataclass(frozen=True)
class Where:
    """Where two computations part first; "" and None for what is not known, or has no meaning there.

    step: from 1. microbatch: from 0. operation: of torch, such as "aten.mul.Tensor". module: whose forward it was in.
    ulps: the largest distance, in units in the last place of the tensor's largest entry.
    """

    step: int | None = None
    microbatch: int | None = None
    tensor: str = ""
    operation: str = ""
    module: str = ""
    ulps: float | None = None

    def __str__(self) -> str:
        parts = [
            f"step {self.step}" if self.step is not None else "",
            f"microbatch {self.microbatch}" if self.microbatch is not None else "",
            f"'{self.tensor}'" if self.tensor else "",
            f"operation {self.operation}" if self.operation else "",
            f"in '{self.module}'" if self.module else "",
            f"off by {self.ulps:,.3g} ulp" if self.ulps is not None else "",
        ]
        return ", ".join(filter(None, parts))


@dataclass(frozen=True)
class Equivalence:
    """One of them. why: the likely cause where it is refuted, or the reason why it was not run, in a sentence.

    note: what else a reader should know of a proof, such as the tolerance. took_s: seconds.
    """

    name: str
    claim: str
    verdict: Verdict
    compared: Compared = Compared()
    why: str = ""
    place: Where | None = None
    note: str = ""
    took_s: float = 0.0


@dataclass(frozen=True)
class Checked:
    """All equivalences of a recipe. cpu_s: of the processor, in all processes; took_s: of the clock."""

    recipe: str
    fingerprint: str
    equivalences: tuple[Equivalence, ...]
    took_s: float = 0.0
    cpu_s: float = 0.0
    libraries: Mapping[str, str] = field(default_factory=dict)

    @property
    def proved(self) -> bool:
        """Whether none is refuted, and one at least is proved, besides that the recipe can be built."""
        proved = any(each.verdict == "proved" and each.name != "recipe" for each in self.equivalences)
        return proved and not self.refuted

    @property
    def refuted(self) -> tuple[Equivalence, ...]:
        """Those that are."""
        return tuple(each for each in self.equivalences if each.verdict == "refuted")

    def __getitem__(self, name: str) -> Equivalence:
        return next(each for each in self.equivalences if each.name == name)

    def __iter__(self) -> Iterator[Equivalence]:
        return iter(self.equivalences)

    def __str__(self) -> str:
        rows = [f"{each.name:<14}{each.verdict:<9}{_told(each)}".rstrip() for each in self.equivalences]
        return "\n".join([*rows, self.verdict])

    @property
    def verdict(self) -> str:
        """How many of each, in a sentence."""
        verdicts = [each.verdict for each in self.equivalences]
        counts = [f"{verdicts.count(each)} {each}" for each in ("proved", "refuted", "not run") if each in verdicts]
        return f"Equivalences: {', '.join(counts)}."

    def document(self) -> dict[str, Any]:
        """What ``--json`` prints, see docs/check.md."""
        return {
            "schema": SCHEMA, "recipe": self.recipe, "fingerprint": self.fingerprint, "proved": self.proved,
            "verdict": self.verdict, "took_s": round(self.took_s, 3), "cpu_s": round(self.cpu_s, 3),
            "libraries": dict(self.libraries), "equivalences": [asdict(each) for each in self.equivalences],
        }  # fmt: skip


def _told(found: Equivalence) -> str:
    where = f"{found.place}: " if found.place is not None and str(found.place) else ""
    return f"{where}{found.why}" if found.why else str(found.compared)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}" if number else ""
