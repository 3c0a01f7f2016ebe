"""The gradient of a step, as a team computes it, beside that of the whole batch in one plain backward.

The plain one is taken in float64 where the model can be, without any of the step's code. Random numbers are those that
the microbatches drew: each draw of the whole batch is given theirs, one after the other along the samples.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from instep.data.cursor import load
from instep.equivalences.forks import Body, Say
from instep.equivalences.parting import ULP
from instep.errors import InstepError
from instep.objectives import Shared
from instep.objectives.any_loss import check as check_loss
from instep.randomness import key, key_of_step, seed_all
from instep.recipe import Recipe
from instep.reduce.reduction import Reduction
from instep.turns import Turns
from instep.worker.gradients import Gradients
from instep.worker.replica import Replica

LET_PASS = 4096.0
"""Ulps of float32, of a tensor's largest entry, that rounding may come to."""

LET_PASS_BFLOAT16 = 2.0**18
"""The same under bfloat16, whose numbers have 16 bits less, and float16."""

_SMALL = 1e-3
"""A tensor counts as no smaller than this share of the largest of all: one that ought to be 0 holds rounding alone."""


@dataclass(frozen=True)
class Whole:
    """What came of one step. off: of each tensor, the largest distance in ulps. cause: a sentence, "" if they agree."""

    step: int
    samples: int
    off: dict[str, float]
    exact: bool
    let_pass: float
    cause: str = ""
    module: str = ""
    skipped: str = ""

    @property
    def worst(self) -> tuple[str, float]:
        """The tensor that is furthest off."""
        return max(self.off.items(), key=lambda each: each[1], default=("", 0.0))

    @property
    def right(self) -> bool:
        return self.worst[1] <= self.let_pass


class WholeBatch(Body):
    """Compares the gradient of `steps`, each from the first weights."""

    def __init__(self, recipe: Recipe):
        self._recipe = recipe

    def run(self, rank: int, ask: Say) -> list[Whole]:
        replica = self.replica = Replica(self._recipe, "cpu")
        replica.learn_terms(0)
        gradients = Gradients(replica)  # one for all, whose hooks stay on the parameters
        return [_Step(replica, gradients, step).compare() for step in _steps(replica)]


def _steps(replica: Replica) -> list[int]:
    """The first, that of each of several objectives, and the last of an epoch where it has fewer samples."""
    cursor, order = replica.cursor, replica.recipe.objective
    last = cursor.steps_per_epoch - 1
    ragged = set() if cursor.size(last) == cursor.size(0) else {last}
    return sorted({0, *ragged, *(order.firsts(0) if isinstance(order, Turns) else ())})


def team_gradient(
    replica: Replica, gradients: Gradients, step: int, batches: Mapping[int, Any]
) -> tuple[Tensor, Sequence[bool]]:
    """The gradient of a step as a team of one adds it up, flat, and which parameters have one.

    batches: by microbatch, of those that have samples.
    """
    microbatches = replica.recipe.microbatches
    reduction = Reduction(gradients.layout, microbatches, 1)
    rows = [torch.zeros(gradients.layout.size) for _ in reduction.nodes]
    gradients.assign(reduction.nodes_of(0), rows)
    counts = [replica.objective.counts_at(step, batch) for batch in batches.values()]
    totals = {name: sum(each[name] for each in counts) for name in counts[0]}
    computed = gradients.compute(step, {m: batches.get(m) for m in range(microbatches)}, totals)
    cut = reduction.pieces[0][0]
    (total,) = reduction.add(0, [row[cut] for row in rows])
    return total, computed.touched


class _Step:
    def __init__(self, replica: Replica, gradients: Gradients, step: int):
        self._replica, self._gradients, self._step = replica, gradients, step
        replica.trainable.begin(step)
        self._module = copy.deepcopy(replica.module)
        self._bf16 = replica.recipe.precision != "float32"

    def compare(self) -> Whole:
        replica, step = self._replica, self._step
        microbatches = range(replica.recipe.microbatches)
        batches = {m: each for m in microbatches if (each := replica.batch(step, m)) is not None}
        samples = replica.cursor.size(step)
        gradient, draws = self._of_team(batches)
        while self._overflows(gradient):
            gradient, draws = self._of_team(batches)
        whole = _together(list(batches.values()))
        if whole is None:
            whole = self._read(samples)
        exact = not self._bf16
        try:
            if exact:
                try:
                    expected = self._plain(whole, draws, torch.float64)
                except (RuntimeError, TypeError, ValueError):
                    exact, expected = False, self._plain(whole, draws, None)
            else:
                expected = self._plain(whole, draws, None)
                while self._overflows(expected):  # sums over more samples are larger
                    expected = self._plain(whole, draws, None)
        except _NotBySample as why:
            return Whole(step, samples, {}, exact, LET_PASS, skipped=str(why))
        off = _off(gradient, expected)
        found = Whole(step, samples, off, exact, LET_PASS_BFLOAT16 if self._bf16 else LET_PASS)
        if found.right:
            return found
        cause, module = self._cause(batches, whole)
        return Whole(step, samples, off, exact, found.let_pass, cause, module)

    def _overflows(self, gradient: dict[str, Tensor]) -> bool:
        """Whether the loss scale, which is then lowered, was too large; a run leaves such steps out."""
        scaler = self._replica.scaler
        if not scaler.yields() or all(bool(torch.isfinite(each).all()) for each in gradient.values()):
            return False
        scaler.made(finite=False)
        return True

    def _of_team(self, batches: dict[int, Any]) -> tuple[dict[str, Tensor], list[list[Tensor]]]:
        """The gradient as one worker's, by name, and what each microbatch drew."""
        replica = self._replica
        draws: list[list[Tensor]] = []
        compute_one = replica.compute

        def noted(*arguments: Any) -> Any:
            with _Drawn() as drawn:
                answer = compute_one(*arguments)
            draws.append(drawn.found)
            return answer

        setattr(replica, "compute", noted)  # noqa: B010  # a method, for this object alone
        try:
            total, touched = team_gradient(replica, self._gradients, self._step, batches)
        finally:
            del replica.__dict__["compute"]
        named = zip(replica.names, self._gradients.layout.views(total), touched, strict=True)
        return {name: view.clone() for name, view, seen in named if seen}, draws

    def _read(self, samples: int) -> Any:
        replica = self._replica
        seed_all(key_of_step(replica.recipe.seed, self._step, 0, "data"))
        indices = replica.cursor.indices(self._step)
        return replica.to_device(load(replica.data.train, indices, replica.data.collate))

    def _plain(self, whole: Any, draws: list[list[Tensor]], dtype: torch.dtype | None) -> dict[str, Tensor]:
        """The gradient of the objective on the whole batch, by name."""
        replica, module = self._replica, copy.deepcopy(self._module)
        if dtype is not None:
            module.to(dtype)
            whole = pytree.tree_map(
                lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, whole
            )
        objective = replica.objective.at(self._step)
        seed_all(key(replica.recipe.seed, self._step, 0, "compute"))
        with replica.autocast(), _Given(draws):
            shared = Shared((objective.share(module, whole),), 0) if objective.shares else None
            sums = objective.sums(module, whole, shared)
        counts = objective.counts(whole)
        terms = [
            w * sums[n].double() / max(1, counts[n]) for n, w in objective.weights(self._step).items() if counts[n]
        ]
        if not terms:
            raise _NotBySample("the step has no items.")
        scale = replica.scaler.value if dtype is None else 1.0
        (scale * torch.stack(terms).sum()).backward()
        named = module.named_parameters()
        return {name: p.grad.detach() / scale for name, p in named if p.grad is not None}

    def _cause(self, batches: dict[int, Any], whole: Any) -> tuple[str, str]:
        """Why the two differ, and the module, "" if it is not a module."""
        objective = self._replica.objective.at(self._step)
        counts = objective.counts(whole)
        parts = [objective.counts(batch) for batch in batches.values()]
        for name, count in counts.items():
            added = sum(each[name] for each in parts)
            if added != count:
                return (
                    f"The counts of term '{name}' of the microbatches add up to {added}, and that of the whole batch "
                    f"is {count}: counts must be of items, so that they add up."
                ), ""
        module = self._first_coupled(list(batches.values()), whole)
        if module:
            where, name = module
            return (
                f"{where} samples see each other: in training one gets another answer when others are beside it, as "
                f"normalisation over a batch does. The gradient depends on how batches are cut, that is on "
                f"recipe.microbatches, as elsewhere on the number of ranks; normalise within a sample, as LayerNorm "
                f"and GroupNorm do."
            ), name
        try:
            said = check_loss(objective.sums, self._module, whole).cause
        except (InstepError, RuntimeError, TypeError, ValueError):
            said = ""
        if said:
            return f"Of the objective: {said}", ""
        return (
            "The cause is unknown: no module and no term of the objective tells samples apart by who is beside them.",
            "",
        )

    def _first_coupled(self, parts: list[Any], whole: Any) -> tuple[str, str] | None:
        """Where a sample's answer first depends on who is beside it, in words, and the module's name."""
        answers = [self._answers(part) for part in parts]
        together = self._answers(whole)
        kinds = dict(self._module.named_modules())
        for name, (given, answer) in together.items():
            found = [each[name] for each in answers if name in each]
            if len(found) < len(answers) or not _apart([each for _, each in found], answer):
                continue
            if given is not None and _apart([each for each, _ in found if each is not None], given):
                outer = name.rpartition(".")[0]
                return f"In the forward of {outer or type(self._module).__name__}, before '{name}',", outer
            return f"In '{name}' ({type(kinds[name]).__name__})", name
        return None

    def _answers(self, batch: Any) -> dict[str, tuple[Tensor | None, Tensor]]:
        """What each module is given and answers in training, dropping nothing, by name, inner ones first."""
        module, found = copy.deepcopy(self._module), dict[str, tuple[Tensor | None, Tensor]]()
        for part in module.modules():
            if isinstance(part, nn.modules.dropout._DropoutNd):
                part.eval()

        def note(name: str) -> Any:
            def noting(_: nn.Module, arguments: Any, answer: Any) -> None:
                if isinstance(answer, Tensor) and name not in found:
                    given = arguments[0] if arguments and isinstance(arguments[0], Tensor) else None
                    found[name] = None if given is None else given.detach(), answer.detach()

            return noting

        for name, part in module.named_modules():
            if name:
                part.register_forward_hook(note(name))
        objective = self._replica.objective.at(self._step)
        with torch.no_grad():
            seed_all(0)
            shared = Shared((objective.share(module, batch),), 0) if objective.shares else None
            found.clear()
            objective.sums(module, batch, shared) if objective.shares else objective.objective(module, batch)
        return found


def _apart(parts: list[Tensor], whole: Tensor) -> bool:
    """Whether what belongs to samples is another in the whole."""
    if not parts or not whole.dim() or any(part.dim() != whole.dim() for part in parts):
        return False
    together = torch.cat(parts) if len({part.shape[1:] for part in parts}) == 1 else parts[0]
    return together.shape == whole.shape and not torch.allclose(together, whole, rtol=1e-5, atol=1e-7)


def _off(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """By name, the largest distance in ulps."""
    sizes = {name: float(value.abs().max()) if value.numel() else 0.0 for name, value in expected.items()}
    least = _SMALL * max(sizes.values(), default=0.0)
    off = {}
    for name in {**found, **expected}:
        a, b = found.get(name), expected.get(name)
        if a is None or b is None:
            given = a if a is not None else b
            off[name] = float("inf") if given is not None and bool(given.any()) else 0.0
            continue
        distance = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
        if not math.isfinite(distance):
            off[name] = float("inf")
            continue
        size = max(sizes[name], least)
        off[name] = distance / (ULP * size) if size else (0.0 if not distance else float("inf"))
    return off


def _together(batches: list[Any]) -> Any | None:
    """One batch of these, along the first dimension; None where that has no clear meaning."""
    flat = [pytree.tree_flatten(batch) for batch in batches]
    if any(structure != flat[0][1] for _, structure in flat):
        return None
    leaves = []
    for group in zip(*(each for each, _ in flat), strict=True):
        if not all(isinstance(leaf, Tensor) and leaf.dim() for leaf in group):
            return None
        if len({tuple(leaf.shape[1:]) for leaf in group}) > 1:
            return None
        leaves.append(torch.cat(group))
    return pytree.tree_unflatten(leaves, flat[0][1])


class _NotBySample(Exception):
    """A draw cannot be put together from those of microbatches."""


def _drawing(func: Any) -> bool:
    """Whether it draws, and one can say what. Attention that drops nothing has the tag too, and gives several."""
    drawn = torch.Tag.nondeterministic_seeded in func.tags
    return drawn and (len(func._schema.returns) == 1 or func._schema.name == "aten::native_dropout")


class _Drawn(TorchDispatchMode):
    """Keeps what is drawn."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        if _drawing(func):
            self.found.append((answer[1] if isinstance(answer, tuple) else answer).detach().clone())
        return answer


class _Given(TorchDispatchMode):
    """Gives draws what microbatches drew, one after the other along a dimension. Raises _NotBySample."""

    def __init__(self, draws: list[list[Tensor]]):
        super().__init__()  # type: ignore[no-untyped-call]
        self._draws, self._place = draws, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        if not _drawing(func):
            return answer
        if isinstance(answer, tuple):  # dropout: the values and the mask
            mask = self._next(answer[1])
            return args[0] * mask / (1 - args[1]), mask
        drawn = self._next(answer)
        if func._schema.is_mutable:
            answer.copy_(drawn)
            return answer
        return drawn.to(answer.dtype)

    def _next(self, like: Tensor) -> Tensor:
        place, self._place = self._place, self._place + 1
        if any(place >= len(each) for each in self._draws):
            raise _NotBySample(
                "a whole batch draws more random numbers than its microbatches, so that none can be compared with "
                "theirs."
            )
        parts = [each[place] for each in self._draws]
        for dim in range(like.dim()):
            others = {tuple(s for d, s in enumerate(part.shape) if d != dim) for part in parts}
            if len(others) == 1 and sum(part.shape[dim] for part in parts) == like.shape[dim]:
                return torch.cat(parts, dim).to(like.dtype)
        raise _NotBySample(
            f"random numbers of shape {list(like.shape)} are drawn for a whole batch and of shape "
            f"{list(parts[0].shape)} for a microbatch: they are not by sample, so that the two are not comparable."
        )
