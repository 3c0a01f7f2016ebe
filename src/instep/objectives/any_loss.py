"""Whether a loss, of whatever library, gives the gradient of the whole batch when loops cut the batch as they do.

The usual loops average: gradient accumulation divides each piece's loss by the number of pieces, DDP averages the
gradients of its ranks. That is the whole batch's gradient only where the loss is a mean over equally many items in each
piece. Instep's own objectives give sums, see `instep.objectives`, which are right for any cut.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from instep.errors import ObjectiveError, shown
from instep.objectives.protocol import TERM
from instep.randomness import seed_all
from instep.restore import kept_random_state

_MOST = 12
"""Samples that are cut up: of more, the first ones."""

_EXACT, _ROUGH = 1e-9, 1e-4
"""Relative differences that count as rounding in float64, and in the model's own type where it has no float64."""

Loop = Literal["accumulation", "DDP", "other order", "more padding"]


@dataclass(frozen=True)
class Cut:
    """One way to go through the batch. off: the distance of its gradient from the whole batch's, as a share of that.

    pieces: samples in each.
    """

    loop: Loop
    pieces: tuple[int, ...]
    off: float

    @property
    def equal(self) -> bool:
        """Whether all pieces have as many samples."""
        return len(set(self.pieces)) == 1

    def __str__(self) -> str:
        sizes = f"{len(self.pieces)} of {self.pieces[0]}" if self.equal else " and ".join(map(str, self.pieces))
        off = f"{100 * self.off:.3g} %" if math.isfinite(self.off) else "not finite"
        return f"{self.loop:<14}{sizes if len(self.pieces) > 1 else 'whole':<16}{off}"


@dataclass(frozen=True)
class LossCheck:
    """What `check` found. verdict: "equal pieces" where it is right for these alone. cause: a sentence, "" if right.

    samples, tensors: that were cut, and whose gradients were compared. exact: whether in float64.
    """

    verdict: Literal["right", "equal pieces", "wrong"]
    cause: str
    cuts: tuple[Cut, ...]
    samples: int
    tensors: int
    exact: bool

    @property
    def worst(self) -> Cut:
        """The cut whose gradient is furthest off."""
        return max(self.cuts, key=lambda cut: cut.off)

    def __str__(self) -> str:
        heads = {"right": "right", "equal pieces": "right for pieces of equal size alone", "wrong": "wrong"}
        compared = f"{len(self.cuts)} cuts of {self.samples} samples, gradients of {self.tensors} tensors"
        said = f"{heads[self.verdict]}: {self.cause}" if self.cause else heads[self.verdict]
        rows = "\n".join(map(str, self.cuts))
        where = "float64" if self.exact else "its own type"
        return f"{said}\n({compared}, in {where})\n\n{'loop':<14}{'pieces':<16}off by\n{rows}"


def check(loss: Callable[[nn.Module, Any], Any], model: nn.Module, batch: Any) -> LossCheck:
    """By how much DDP and accumulation are off with this loss, and why.

    >>> model = torch.nn.Linear(3, 4)
    >>> batch = torch.randn(8, 3), torch.tensor([0, 1, -100, -100, -100, 2, 3, 1])
    >>> found = objectives.check(lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1]), model, batch)
    >>> found.verdict
    'wrong'

    loss: gives, for a model and a batch, a scalar, or what holds one as ``loss``, as outputs of transformers do; or a
    mapping of sums, as an objective of Instep does. model: is copied, in eval mode, so that nothing is drawn, and in
    float64 where it can be. batch: tensors in any nest, whose first dimension is the samples; what has another first
    dimension goes into each piece whole. Of a mapping with ``labels``, padding on the right is tried too.

    Raises ObjectiveError where the batch has fewer than four samples, or where two calls in a row differ.
    """
    samples = _samples(batch)
    work = _Work(loss, model, _head(batch, samples), samples)
    cuts = [work.cut(loop, pieces) for loop, pieces in _ways(samples)]
    cuts += [work.changed("other order", order) for order in work.orders()]
    cuts += [work.changed("more padding", padded) for padded in work.padded()]
    verdict, cause = _judged(work, cuts)
    return LossCheck(verdict, cause, tuple(cuts), samples, work.tensors, work.exact)


def _samples(batch: Any) -> int:
    sizes = [leaf.shape[0] for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
    if not sizes or sizes[0] < 4:
        raise ObjectiveError(
            f"the batch has {sizes[0] if sizes else 'no'} samples, by the first dimension of its first tensor, and to "
            f"be cut up it needs four or more."
        )
    return min(sizes[0], _MOST)


def _head(batch: Any, samples: int) -> Any:
    """The first samples."""
    whole = next(leaf.shape[0] for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim())
    return _taken(batch, whole, torch.arange(samples))


def _taken(batch: Any, whole: int, places: Tensor) -> Any:
    return pytree.tree_map(
        lambda leaf: (
            leaf[places.to(leaf.device)] if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == whole else leaf
        ),
        batch,
    )


def _ways(samples: int) -> Iterator[tuple[Loop, list[Tensor]]]:
    """Accumulation cuts into neighbours, DDP's sampler deals samples out in turn; into every number of pieces, and with
    a last batch that is smaller.
    """
    everyone = torch.arange(samples)
    for count in range(2, samples + 1):
        if samples % count == 0:
            yield "accumulation", list(everyone.chunk(count))
            yield "DDP", [everyone[rank::count] for rank in range(count)]
    first = samples - max(1, samples // 3)
    if first != samples - first:
        yield "accumulation", [everyone[:first], everyone[first:]]


class _NoFloat32(TorchFunctionMode):
    """What asks for float32 gets float64. Models compute parts in float32 whatever their own type, as transformers does
    rotary embeddings, and there the last bit of a value may depend on how many lie beside it, by processor.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(
            torch.dtype, lambda each: torch.float64 if each is torch.float32 else each, (args, kwargs or {})
        )
        return (Tensor.double if func is Tensor.float else func)(*args, **kwargs)


class _Work:
    """The loss on a copy of the model."""

    def __init__(self, loss: Callable[[nn.Module, Any], Any], model: nn.Module, batch: Any, samples: int):
        self._loss, self._batch, self._samples = loss, batch, samples
        self._model = copy.deepcopy(getattr(model, "_orig_mod", model)).eval()
        self._into_float64()
        self.whole = self.gradients(self._batch)
        again = self.gradients(self._batch)
        self.tensors = sum(parameter.requires_grad for parameter in self._model.parameters())
        if any(_off(again[name], whole) > self.tolerance for name, whole in self.whole.items()):
            raise ObjectiveError(
                "the loss of the same model and batch has another gradient in a second call, with the same random "
                "numbers: it keeps state, so it cannot be compared; make it depend on its arguments alone."
            )

    @property
    def tolerance(self) -> float:
        return _EXACT if self.exact else _ROUGH

    def _into_float64(self) -> None:
        """Where it can be. Sets `exact`: whether it could."""
        own, batch = copy.deepcopy(self._model), self._batch
        try:
            self._model.double()
            self.exact = True
            self._batch = pytree.tree_map(
                lambda leaf: leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, batch
            )
            self.gradients(self._batch)
        except (RuntimeError, TypeError, ValueError):
            self._model, self._batch, self.exact = own, batch, False

    def gradients(self, batch: Any) -> dict[str, Tensor]:
        """By term, the gradient as one vector, float64."""
        with kept_random_state(), _NoFloat32() if self.exact else nullcontext():
            seed_all(0)
            answer = self._loss(self._model, batch)
        self._mapped = isinstance(answer, Mapping) and "loss" not in answer
        terms = dict(answer) if self._mapped else {TERM: _scalar(answer)}
        parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        found = {}
        for name, value in terms.items():
            if not isinstance(value, Tensor) or not value.requires_grad:
                continue  # a metric
            parts = torch.autograd.grad(value.sum(), parameters, retain_graph=True, allow_unused=True)
            if all(part is None for part in parts):
                continue
            found[name] = torch.cat(
                [
                    (torch.zeros_like(parameter) if part is None else part).flatten().double()
                    for part, parameter in zip(parts, parameters, strict=True)
                ]
            )
        if not found:
            raise ObjectiveError(
                "the loss does not depend on a parameter that is trained; there is nothing to compare."
            )
        return found

    def of_pieces(self, pieces: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        return [self.gradients(_taken(self._batch, self._samples, piece)) for piece in pieces]

    def cut(self, loop: Loop, pieces: Sequence[Tensor]) -> Cut:
        found = self.of_pieces(pieces)
        share = 1.0 if self._mapped else 1 / len(pieces)
        total = {name: share * torch.stack([piece[name] for piece in found]).sum(0) for name in self.whole}
        return self._compared(loop, tuple(map(len, pieces)), total)

    def changed(self, loop: Loop, batch: Any) -> Cut:
        return self._compared(loop, (self._samples,), self.gradients(batch))

    def orders(self) -> list[Any]:
        return [_taken(self._batch, self._samples, torch.arange(self._samples).flip(0))]

    def padded(self) -> list[Any]:
        """As collators of transformers pad: labels -100, a mask of zeros, token 0."""
        batch, fill = self._batch, {"labels": -100, "attention_mask": 0, "input_ids": 0}
        if not isinstance(batch, Mapping) or not {"labels", "input_ids"} <= set(batch):
            return []
        length = batch["input_ids"].shape[1] if batch["input_ids"].dim() == 2 else 0
        if not length or tuple(batch["labels"].shape) != tuple(batch["input_ids"].shape) or set(batch) - set(fill):
            return []
        longer = {name: nn.functional.pad(value, (0, 3), value=fill[name]) for name, value in batch.items()}
        if "attention_mask" not in longer:
            return []
        return [longer]

    def _compared(self, loop: Loop, pieces: tuple[int, ...], total: Mapping[str, Tensor]) -> Cut:
        return Cut(loop, pieces, max(_off(total[name], whole) for name, whole in self.whole.items()))


def _scalar(answer: Any) -> Tensor:
    if isinstance(answer, Mapping):
        answer = answer["loss"]
    elif not isinstance(answer, Tensor):
        answer = getattr(answer, "loss", answer[0] if isinstance(answer, (tuple, list)) and answer else answer)
    if not isinstance(answer, Tensor) or answer.numel() != 1:
        raise ObjectiveError(
            f"the loss gives {shown(answer)}, which is no scalar tensor; give a function that returns one, such as "
            f"lambda model, batch: criterion(model(batch[0]), batch[1])."
        )
    return answer


def _off(found: Tensor, whole: Tensor) -> float:
    size, distance = float(whole.norm()), float((found - whole).norm())
    if not math.isfinite(distance):
        return math.inf
    return distance / size if size else distance


def _judged(work: _Work, cuts: Sequence[Cut]) -> tuple[Literal["right", "equal pieces", "wrong"], str]:
    wrong = [cut for cut in cuts if cut.off > work.tolerance]
    if not wrong:
        return "right", ""
    at = {cut.loop for cut in wrong}
    if "other order" in at:
        return "wrong", "it depends on the order of the samples, which no cut keeps."
    if "more padding" in at:
        return (
            "wrong",
            "padding changes it: what is padded is not masked everywhere, so it depends on who is beside whom.",
        )
    if not any(cut.equal for cut in wrong):
        return "equal pieces", (
            "it is a mean over samples, so a smaller last piece weighs as much as the others; leave it out, or weigh "
            "each piece by its samples."
        )
    plain = max((cut for cut in wrong if math.isfinite(cut.off)), key=_plainness, default=None)
    empty = " A piece without such an item is not even finite." if any(math.isinf(cut.off) for cut in wrong) else ""
    return "wrong", f"{_cause(work, plain)}{empty}" if plain is not None else "no piece of it is finite."


def _plainness(cut: Cut) -> tuple[bool, int, float]:
    """Few equal pieces tell most of what is wrong."""
    return cut.equal, -len(cut.pieces), cut.off


def _cause(work: _Work, cut: Cut) -> str:
    pieces = next(
        pieces for loop, pieces in _ways(work._samples) if loop == cut.loop and tuple(map(len, pieces)) == cut.pieces
    )
    if work._mapped:
        return "a term is no sum over samples: pieces do not add up to the whole; see what divides or couples in it."
    (whole,), found = work.whole.values(), [next(iter(piece.values())) for piece in work.of_pieces(pieces)]
    if _off(sum(found[1:], start=found[0]), whole) <= work.tolerance:
        return (
            f"it is a sum, and loops average: {len(pieces)} pieces give 1/{len(pieces)} of the gradient, so the number "
            f"of pieces changes the learning rate; divide by the items of the whole batch."
        )
    shares = torch.linalg.lstsq(torch.stack(found, 1), whole[:, None]).solution[:, 0]
    left = _off(torch.stack(found, 1) @ shares, whole)
    if left <= 1e3 * work.tolerance and float(shares.min()) >= -1e-6:
        told = ", ".join(f"{100 * float(share):.3g} %" for share in shares)
        return (
            f"it is a mean over items, such as tokens that are not ignored, and pieces hold different numbers of them: "
            f"they ought to weigh {told}, and loops weigh them alike; divide sums by the items of the whole batch."
        )
    return (
        "samples of a batch see each other in it, as in contrastive losses, so that no weights make pieces the whole; "
        "such a loss needs the whole batch's features."
    )
