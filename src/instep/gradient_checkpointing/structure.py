"""What a profile found, and what a plan says: data alone, without torch.

The memory of a step is modelled by *moments*. Between them, what is held is the sum of what every block holds;
around it lies the rest, the base: outputs of blocks, what is outside them, and what lives for a moment.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from instep.budget import as_size

SHOWN = 12
"""Kinds of blocks that a plan tells of, so that what is printed fits a screen."""


@dataclass(frozen=True)
class Storage:
    """Memory that an operation of a block made. `born`, `dies`: numbers of operations in the block.

    After operation `dies` nothing but backward refers to it; it is the number of operations where the block's end
    does not either. `packed`: backward reads it. `escapes`: it leaves the block, so it is there whatever is kept.
    `bare`: it is, or may be, read past the dispatcher, as by ``tolist``, so it has to be there in recompute too.
    """

    nbytes: int
    born: int
    dies: int
    packed: bool
    escapes: bool = False
    bare: bool = False


@dataclass(frozen=True)
class Operation:
    """One operation of a block, as the dispatcher sees it.

    name: such as ``aten.addmm.default``. module: which part of the block called it, "" for the block itself.
    reads, writes: indices of the block's storages whose values it reads, and that it makes or changes in place.
    views: the storage that its output is a view of; a view costs nothing and has no values of its own.
    changes: the output is an input, changed in place. random: it draws random numbers. constant: its answer is no
    tensor but a number, which is always remembered. pinned: it changes a buffer, or makes what takes no memory in the
    profile, and is always done again. generator: it draws from one that it is given, not from the default one.
    """

    name: str
    module: str = ""
    flops: int = 0
    seconds: float = 0.0
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    views: int | None = None
    changes: bool = False
    random: bool = False
    constant: bool = False
    pinned: bool = False
    generator: bool = False


@dataclass(frozen=True)
class BlockKind:
    """What identical blocks have in common.

    held_bytes: what the block holds for backward where nothing is recomputed. extra_bytes: what it holds besides when
    it is checkpointed, to the end of its backward: inputs that backward does not read. buffers: those that forward
    changes, of `buffer_bytes`: a checkpointed block holds copies of them, and makes more to be computed again.
    cast_bytes: weights that autocast has cast, which stay in its cache for a while whatever becomes of the block.
    """

    operations: tuple[Operation, ...]
    storages: tuple[Storage, ...]
    held_bytes: int
    extra_bytes: int = 0
    buffers: tuple[str, ...] = ()
    buffer_bytes: int = 0
    cast_bytes: int = 0


@dataclass(frozen=True)
class Moment:
    """A part of the step. `base_bytes` is alive then, at its peak, beside what blocks hold.

    kind: ``run``: nothing changes, in the backward of `block` if it is one; ``hold``: block `block` has ended its
    forward and holds from here on; ``clear``: autocast's cache lets go of the weights that it cast for the block;
    ``recompute``: its backward begins.
    """

    kind: Literal["run", "hold", "clear", "recompute"]
    base_bytes: int = 0
    block: int = -1


@dataclass(frozen=True)
class Overheads:
    """What recompute takes beside its operations.

    block_s: a checkpointed block. op_s: an operation that is run again, in Python and autograd. watched_op_s: an
    operation of a block that is planned by operation, both passes together.
    """

    block_s: float = 0.0
    op_s: float = 0.0
    watched_op_s: float = 0.0


@dataclass(frozen=True)
class Profile:
    """One microbatch, forward and backward, with nothing recomputed.

    names: of the blocks, in the model. kind_of: the kind of each. moments: the step, in order. Bytes are activations:
    all memory that the step needs beside weights, their gradients, buffers and the batch.
    """

    kinds: tuple[BlockKind, ...]
    names: tuple[str, ...]
    kind_of: tuple[int, ...]
    moments: tuple[Moment, ...]
    flops: int
    seconds: float
    peak_bytes: int
    overheads: Overheads = field(default_factory=Overheads)

    def __repr__(self) -> str:
        return f"<Profile: peak {as_size(self.peak_bytes)}, {len(self.names)} blocks of {len(self.kinds)} kinds>"

    @property
    def held_bytes(self) -> int:
        """What all blocks hold for backward."""
        return sum(self.kinds[kind].held_bytes for kind in self.kind_of)


class Act(Enum):
    """What becomes of an operation of a checkpointed block when backward needs the block.

    KEEP: its output was kept. REPEAT: it is done again. SKIP: nothing needs its output, of which there is only the
    shape.
    """

    KEEP = "keep"
    REPEAT = "repeat"
    SKIP = "skip"


@dataclass(frozen=True)
class Choice:
    """What one block does. `acts` is empty where it is not checkpointed.

    held_bytes: from its forward to its backward. recompute_bytes: its own peak while it is recomputed, what it held
    included. flops, seconds: extra work. kept: the storages that are kept.
    """

    held_bytes: int
    recompute_bytes: int
    flops: int
    seconds: float
    acts: tuple[Act, ...] = ()
    kept: tuple[int, ...] = ()

    @property
    def selective(self) -> bool:
        """Whether something is kept, so that the block needs to be watched by operation."""
        return Act.KEEP in self.acts or Act.SKIP in self.acts


@dataclass(frozen=True)
class BlockPlan:
    """One block's part in a plan: its name in the model, its kind in the profile and what it does."""

    name: str
    kind: BlockKind
    choice: Choice


@dataclass(frozen=True)
class Plan:
    """What each block keeps and recomputes.

    peak_bytes, held_bytes: predicted. flops, seconds: extra work in a step of one microbatch, and `step_flops`,
    `step_seconds` that of the step itself. lower_bound: what any plan within the budget costs at least, in the unit
    of `price` (seconds or FLOPs).
    """

    blocks: tuple[BlockPlan, ...]
    budget_bytes: int
    peak_bytes: int
    held_bytes: int
    flops: int
    seconds: float
    step_flops: int
    step_seconds: float
    nothing_bytes: int
    """The peak where nothing is recomputed."""
    price: Literal["seconds", "flops"] = "seconds"
    lower_bound: float = 0.0

    @property
    def checkpointed(self) -> int:
        """How many blocks recompute anything."""
        return sum(bool(block.choice.acts) for block in self.blocks)

    @property
    def cost(self) -> float:
        """The extra work, in the unit of `price`."""
        return self.seconds if self.price == "seconds" else float(self.flops)

    @property
    def extra_time(self) -> float:
        """Predicted extra time, as a share of the step's."""
        return self.seconds / self.step_seconds if self.step_seconds else 0.0

    @property
    def extra_flops(self) -> float:
        """Extra FLOPs, as a share of the step's."""
        return self.flops / self.step_flops if self.step_flops else 0.0

    def describe(self) -> str:
        """What is kept, and how far the plan is from the lower bound: some lines of text."""
        lines = [
            f"predicted peak {as_size(self.peak_bytes)} of {as_size(self.nothing_bytes)} with nothing recomputed; "
            f"extra work {100 * self.extra_flops:.1f} % of the step's FLOPs, {100 * self.extra_time:.1f} % of its time",
            self.distance(),
        ]
        groups = self.groups()
        lines += [f"{listed(names)}: {text}" for text, names in groups[:SHOWN]]
        if len(groups) > SHOWN:
            lines.append(f"and {len(groups) - SHOWN} more kinds of blocks")
        wrapped = [textwrap.wrap(text, 80, subsequent_indent="  ", max_lines=3) for text in lines]
        return "\n".join(line for text in wrapped for line in text)

    def __str__(self) -> str:
        return self.describe()

    def __repr__(self) -> str:
        blocks = f"{self.checkpointed} of {len(self.blocks)} blocks recomputed"
        return f"<Plan: peak {as_size(self.peak_bytes)} of {as_size(self.nothing_bytes)}, {blocks}>"

    def distance(self) -> str:
        """How far the plan is from the lower bound."""
        step = self.step_seconds if self.price == "seconds" else float(self.step_flops)
        unit = "time" if self.price == "seconds" else "FLOPs"
        if not step:
            return "the step has no measured work to compare with"
        cost, bound = 100 * self.cost / step, 100 * self.lower_bound / step
        return (
            f"this plan costs {cost:.1f} % of the step's {unit}; none within the budget costs less than "
            f"{bound:.1f} %, for whatever backward needs and does not find is made again at least once"
        )

    def groups(self) -> list[tuple[str, list[str]]]:
        """What blocks do, in words, each with the names of those that do it."""
        found: dict[str, list[str]] = {}
        for block in self.blocks:
            found.setdefault(kept_in_words(block.kind, block.choice), []).append(block.name)
        return list(found.items())


def kept_in_words(kind: BlockKind, choice: Choice) -> str:
    """What a block keeps, such as "keeps attention.into_residual matmul, block add"."""
    if not choice.acts:
        return "not checkpointed"
    names = []
    for index in choice.kept:
        made = [op for op in kind.operations if index in op.writes][-1]
        names.append(f"{made.module or 'block'} {_plain(made.name)}")
    return f"keeps {', '.join(dict.fromkeys(names))}" if names else "recomputed whole"


def _plain(name: str) -> str:
    """An operation in plain words."""
    base = name.split(".")[1].strip("_")
    if base.startswith("scaled_dot_product"):
        return "scores and values"
    return "matmul" if base in ("mm", "addmm", "bmm", "baddbmm") else base.removeprefix("native_").replace("_", " ")


def listed(names: Sequence[str]) -> str:
    """The names of some blocks, shortly."""
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)} blocks)"
