"""What a verification of a run comes to: plain data, which a text and a document of JSON are made from. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from instep.record.result import Proof

SCHEMA = 1
"""The version of the document."""


@dataclass(frozen=True)
class SpanVerified:
    """Steps that were computed again from the weights of version `start` to those of version `stop`.

    digest: of the weights that they come to here; "" where nothing could be computed. why: what is wrong, a sentence.
    """

    start: int
    stop: int
    steps: int
    digest: str
    proof: Proof
    why: str = ""

    @property
    def verdict(self) -> Literal["same", "wrong"]:
        """Whether all that the tape and the checkpoints tell of it is what it comes to here."""
        return "wrong" if self.why else "same"


@dataclass(frozen=True)
class Verified:
    """The receipt. sample: the share of the steps that was asked for; seed: of the draw. steps: of the run.

    comparable: how many of them could be computed again here. digest: of the run's last weights, as its tape tells;
    None where the run has not ended. problems: sentences on checkpoints that are not as the tape tells.
    """

    run: str | None
    recipe: str
    fingerprint: str
    rule: str
    engine: str
    seed: int
    sample: float
    steps: int
    comparable: int
    digest: str | None
    spans: tuple[SpanVerified, ...]
    problems: tuple[str, ...] = ()
    libraries: Mapping[str, str] = field(default_factory=dict)
    processor: str = ""
    took_s: float = 0.0

    @property
    def computed(self) -> int:
        """How many steps were computed again."""
        return sum(span.steps for span in self.spans)

    @property
    def share(self) -> float:
        """Of all steps, those that were."""
        return self.computed / self.steps if self.steps else 0.0

    @property
    def wrong(self) -> tuple[SpanVerified, ...]:
        """The spans that are."""
        return tuple(span for span in self.spans if span.why)

    @property
    def verdict(self) -> Literal["same", "wrong"]:
        """Whether everything that was looked at is as it should be."""
        return "wrong" if self.wrong or self.problems else "same"

    def __str__(self) -> str:
        spans = [
            f"versions {each.start:,} to {each.stop:,}: {each.why or f'the same, {each.proof}'}" for each in self.spans
        ]
        others = "the others were made by what is not here, or need not repeat"
        partly = [f"comparable   {self.comparable:,} of {self.steps:,} steps here; {others}"]
        return "\n".join([
            f"run          {self.run or 'without an id'}",
            f"recipe       {self.recipe}, {self.fingerprint}",
            f"seed         {self.seed}",
            *(f"span         {each}" for each in spans),
            *(f"checkpoint   {each}" for each in self.problems),
            *(partly if self.comparable < self.steps else []),
            f"computed     {self.computed:,} of {self.steps:,} steps again, {self.share:.3%}, with {self.processor}",
            f"digest       {self.digest or 'none, for the run has not ended'}",
            f"verdict      {self.verdict}",
        ])  # fmt: skip

    def document(self) -> dict[str, Any]:
        """What ``--json`` prints, see docs/verify.md."""
        spans = [
            {
                "start": each.start, "stop": each.stop, "steps": each.steps, "verdict": each.verdict,
                "digest": each.digest or None, "compared": asdict(each.proof), "why": each.why,
            }
            for each in self.spans
        ]  # fmt: skip
        return {
            "schema": SCHEMA, "run": self.run, "recipe": self.recipe, "fingerprint": self.fingerprint,
            "rule": self.rule, "engine": self.engine, "seed": self.seed, "sample": self.sample, "steps": self.steps,
            "comparable": self.comparable, "computed": self.computed, "share": self.share, "digest": self.digest,
            "verdict": self.verdict, "spans": spans, "problems": list(self.problems),
            "libraries": dict(self.libraries), "processor": self.processor, "took_s": round(self.took_s, 3),
        }  # fmt: skip
