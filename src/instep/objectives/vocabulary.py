"""Losses over a vocabulary in chunks of tokens, so that the logits of a whole batch never exist.

The logits of N tokens and V words are N x V numbers; the loss's backward needs as many again, twice. Here a chunk of
rows is projected, its loss and the gradient of its logits are computed, and that is multiplied at once into the
gradients of hidden states, [N, D], and head, [V, D], which is all that is kept (as in Cut Cross-Entropy, Wijmans et
al., 2024, arXiv:2411.09009, and Liger, Hsu et al., 2024, arXiv:2410.10989, without kernels of their own).

A model offers this by two attributes: ``hidden(inputs)``, the hidden states [B, T, D] from which ``head``, a
`torch.nn.Linear` from D to V, makes the logits that the model itself gives; `instep.models.GPT` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instep.errors import ObjectiveError
from instep.restore import kept_module_state, kept_random_state

CHUNK_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 26}
"""Logits that are held at once, by kind of device: 128 MiB and 256 MiB in float32."""

BLOCK_ELEMENTS = 1 << 18
"""Logits of a chunk that the loss takes at once on a CPU: 1 MiB, so that they stay in its cache."""

LEAST_ROWS = 64

_APART = 0.05
"""Share of the largest logit that two ways to it may differ by: low precision and other kernels."""
"""Fewer rows would make the projection slow."""

Rows = Callable[..., tuple[Tensor, ...]]
"""``f(logits, *others)``: from logits [n, V] and what belongs to their rows, scalar sums over the rows.

The first is minimised, the others are metrics. It must be a sum over rows, each from its own row alone. Its gradient is
autograd's, unless it has ``with_gradient(logits, *others)``, which gives the sums and overwrites the logits with the
gradient of the first.
"""


@dataclass(frozen=True)
class Predictions:
    """What a model predicts for N tokens: `logits` [N, V], or `hidden` [N, D] and the `head` that gives logits."""

    logits: Tensor | None = None
    hidden: Tensor | None = None
    head: nn.Linear | None = None

    @property
    def vocabulary(self) -> int:
        """V, how many words there are."""
        if self.logits is not None:
            return self.logits.shape[1]
        assert self.head is not None
        return self.head.weight.shape[0]

    def select(self, rows: Tensor) -> Predictions:
        """Those of the rows at `rows`, indices."""
        if self.logits is not None:
            return Predictions(logits=self.logits[rows])
        assert self.hidden is not None
        return Predictions(hidden=self.hidden[rows], head=self.head)

    def part(self, start: int, stop: int) -> Tensor:
        """Logits [stop - start, V] of the rows from `start`."""
        if self.logits is not None:
            return _wide(self.logits[start:stop])
        assert self.hidden is not None
        assert self.head is not None
        return _wide(F.linear(self.hidden[start:stop], self.head.weight, self.head.bias))

    def total(self, f: Rows, *others: Tensor | Predictions) -> tuple[Tensor, ...]:
        """The sums of `f` over all rows. `others` have N rows each; predictions among them come as logits."""
        if self.logits is not None:
            return f(_wide(self.logits), *_parts(others, 0, len(self.logits)))
        assert self.hidden is not None
        assert self.head is not None
        found: tuple[Tensor, ...] = _Total.apply(  # type: ignore[no-untyped-call]
            f, others, torch.is_grad_enabled(), self.hidden, self.head.weight, self.head.bias
        )
        return found

    def each(self, f: Callable[..., Tensor], *others: Tensor) -> Tensor:
        """[N]: what `f(logits, *others)` gives for each row. The logits are computed again for the gradient."""
        if self.logits is not None:
            return f(_wide(self.logits), *others)
        assert self.hidden is not None
        assert self.head is not None
        found: Tensor = _Each.apply(  # type: ignore[no-untyped-call]
            f, others, self.hidden, self.head.weight, self.head.bias
        )
        return found


def predict(model: nn.Module, inputs: Tensor, rows: Tensor, whose: str, **others: Any) -> Predictions:
    """What `model` predicts for the tokens at `rows` (indices into the flattened `inputs`, [B, T]).

    With a model that offers hidden states, logits come in chunks where they would not fit into one; otherwise the model
    is called as it is, and gives logits [B, T, V], or an object that has them as ``.logits``. `whose` is the objective
    that asks, `others` what the model and its ``hidden`` are given by name. Raises ObjectiveError for an answer of
    another shape.
    """
    head: Any = getattr(model, "head", None)
    hidden_of: Any = getattr(model, "hidden", None)
    offers = isinstance(head, nn.Linear) and callable(hidden_of) and not isinstance(hidden_of, nn.Module)  # a layer
    if offers and len(rows) > chunk_rows(head.weight.shape[0], inputs.device.type):
        hidden = hidden_of(inputs, **others)
        _check_shape(hidden, inputs, whose, f"hidden states of shape [{_listed(inputs)}, {head.in_features}]")
        if hidden.shape[2] != head.in_features:
            raise ObjectiveError(
                f"the model's hidden states are {hidden.shape[2]} wide and its head takes {head.in_features}; "
                f"'head' must make the model's logits from what 'hidden' gives."
            )
        _check_that_it_agrees(model, inputs, others)
        return _selected(Predictions(hidden=hidden.flatten(0, 1), head=head), rows)
    answer = model(inputs, **others)
    logits = getattr(answer, "logits", answer)
    _check_shape(logits, inputs, whose, f"logits of shape [{_listed(inputs)}, vocabulary]")
    return _selected(Predictions(logits=logits.flatten(0, 1)), rows)


_AGREED: WeakSet[nn.Module] = WeakSet()
"""Models of which `_check_that_it_agrees` has seen an answer."""


def _check_that_it_agrees(model: nn.Module, inputs: Tensor, others: Mapping[str, Any]) -> None:
    """Raises ObjectiveError where the model's logits are not what its head makes of its hidden states.

    Looks at one text, once for each model, in eval mode; leaves no trace.
    """
    model = getattr(model, "_orig_mod", model)  # one text would have a compiled model compiled again
    if model in _AGREED:
        return
    written: Any = model
    with torch.no_grad(), kept_random_state(), kept_module_state(model, training=False):
        text, told = inputs[:1], {n: each[:1] if isinstance(each, Tensor) else each for n, each in others.items()}
        answer = model(text, **told)
        logits, found = getattr(answer, "logits", answer), written.head(written.hidden(text, **told))
    apart, scale = float((logits - found).abs().max()), float(logits.abs().max())
    if not apart <= _APART * scale:
        raise ObjectiveError(
            f"the model's logits are not what its 'head' makes of its 'hidden' states: they differ by up to "
            f"{apart:.2g}, where the largest is {scale:.2g}, and a loss in chunks takes them for the same; do in "
            f"'hidden' all that the model does before its head, or give 'hidden' another name."
        )
    _AGREED.add(model)


def chunk_rows(vocabulary: int, device: str = "cpu") -> int:
    """Rows of a chunk: as many as fit into `CHUNK_ELEMENTS`, in multiples of 64, and at least 64."""
    fitting = CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["cuda"]) // vocabulary
    return max(LEAST_ROWS, fitting // LEAST_ROWS * LEAST_ROWS)


class _Total(torch.autograd.Function):
    """The sums of `Predictions.total`, with the gradient of the first found chunk by chunk in forward.

    In float16 it is found in backward, from logits that are computed again: only there is it known what it is to be
    multiplied by, and without the loss scale it would be too small for float16, or too large.
    """

    @staticmethod
    def forward(
        ctx: Any, f: Rows, others: Any, recorded: bool, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Any:
        narrow = _compute_type(hidden) is torch.float16
        wanted = [recorded and needed and not narrow for needed in ctx.needs_input_grad[3:]]
        work = _Projection(wanted, hidden, weight, bias)
        blocks: list[tuple[Tensor, ...]] = []
        for start, stop in work.chunks():
            logits = work.logits(start, stop)
            for block, parts, _ in work.blocks(logits, others, start, stop):
                blocks.append(_with_gradient(f, block, parts) if work.wanted else f(_wide(block), *parts))
            del block, parts  # or a chunk of the teacher's logits would live on beside the next
            if work.wanted:
                work.add(start, stop, logits)
        ctx.gradients, ctx.work = work.gradients, (f, others, work.dtype) if narrow else None
        if narrow:
            ctx.save_for_backward(hidden, weight, bias)
        totals = [torch.stack(each).sum() for each in zip(*blocks, strict=True)]
        ctx.mark_non_differentiable(*totals[1:])
        return tuple(totals)

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        _refuse_second_derivatives()
        if ctx.work is not None:
            return None, None, None, *_late_gradients(ctx, outer[0].float())
        if ctx.gradients is None:
            raise ObjectiveError(
                "backward came twice through a loss over a vocabulary, whose gradient is kept for one; compute the "
                "objective again instead of keeping its graph."
            )
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place: a second copy of the head would be large
        return None, None, None, *(None if each is None else each.mul_(outer[0].to(each.dtype)) for each in gradients)


def _late_gradients(ctx: Any, outer: Tensor) -> list[Tensor | None]:
    """Those that are found in backward, from logits that are computed again. outer: one for all rows, or one a row."""
    f, others, dtype = ctx.work
    hidden, weight, bias = ctx.saved_tensors
    work = _Projection(ctx.needs_input_grad[-3:], hidden, weight, bias, dtype)
    for start, stop in work.chunks():
        logits = work.logits(start, stop)
        for block, parts, place in work.blocks(logits, others, start, stop):
            _with_gradient(f, block, parts, outer[place : place + len(block)] if outer.dim() else outer)
        del block, parts
        work.add(start, stop, logits)
    return work.gradients


class _Each(torch.autograd.Function):
    """The values of `Predictions.each`. Their gradients are known in backward alone, so logits are computed twice."""

    @staticmethod
    def forward(ctx: Any, f: Any, others: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        work = _Projection((False, False, False), hidden, weight, bias)
        values = [
            f(_wide(block), *parts)
            for chunk in work.chunks()
            for block, parts, _ in work.blocks(work.logits(*chunk), others, *chunk)
        ]
        ctx.work = lambda logits, *parts: (f(logits, *parts),), others, work.dtype
        ctx.save_for_backward(hidden, weight, bias)
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        _refuse_second_derivatives()
        return None, None, *_late_gradients(ctx, outer[0])


def _refuse_second_derivatives() -> None:
    """Raises ObjectiveError in a backward that is itself recorded: what is computed there has no graph of its own."""
    if torch.is_grad_enabled():
        raise ObjectiveError(
            "a loss over a vocabulary in chunks has no second derivative, which create_graph=True asks for; take a "
            "model without 'hidden', whose logits come at once."
        )


def _with_gradient(f: Rows, logits: Tensor, parts: Sequence[Tensor], outer: Tensor | None = None) -> tuple[Tensor, ...]:
    """What `f` gives; `logits` are overwritten with the gradient of the first, times `outer`."""
    known = getattr(f, "with_gradient", None)
    if known is None:
        leaf = logits.detach().requires_grad_()
        with torch.enable_grad():
            outputs = f(_wide(leaf), *parts)
        times = None if outer is None else outer.to(outputs[0].dtype)
        gradient = torch.autograd.grad(outputs[0], leaf, times)[0]
        outputs = tuple(value.detach() for value in outputs)
    else:
        gradient = _wide(logits)
        outputs = known(gradient, *parts)
        if outer is not None:
            gradient.mul_(outer)
    if gradient is not logits:
        logits.copy_(gradient)
    return outputs


class _Projection:
    """The chunks of one projection, and the gradients of its three inputs as they add up."""

    def __init__(
        self,
        wanted: Sequence[bool],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype | None = None,
    ):
        self.dtype = dtype or _compute_type(hidden)
        self.wanted = any(wanted)
        self._buffer: Tensor | None = None
        self._hidden, self._weight = hidden.to(self.dtype), weight.to(self.dtype)
        self._bias = None if bias is None else bias.to(self.dtype)
        self.gradients: list[Tensor | None] = [
            torch.zeros_like(each, dtype=_wide_type(each.dtype)) if want and each is not None else None
            for want, each in zip(wanted, (hidden, weight, bias), strict=True)
        ]

    def chunks(self) -> list[tuple[int, int]]:
        """Where each chunk of rows starts and stops."""
        rows, size = len(self._hidden), chunk_rows(len(self._weight), self._hidden.device.type)
        return [(start, min(start + size, rows)) for start in range(0, rows, size)] or [(0, 0)]

    def logits(self, start: int, stop: int) -> Tensor:
        """[stop - start, V], in memory that the next chunk takes over."""
        with torch.no_grad(), torch.autocast(self._hidden.device.type, enabled=False):
            if self._buffer is None or len(self._buffer) < stop - start:
                self._buffer = self._hidden.new_empty(stop - start, len(self._weight))
            logits = torch.mm(self._hidden[start:stop], self._weight.T, out=self._buffer[: stop - start])
            if self._bias is not None:
                logits += self._bias
        return logits

    def blocks(
        self, logits: Tensor, others: Sequence[Tensor | Predictions], start: int, stop: int
    ) -> Iterator[tuple[Tensor, list[Tensor], int]]:
        """A chunk's logits and what belongs to them, in blocks of rows, each with the row that it starts from."""
        parts = _parts(others, start, stop)
        size = max(1, BLOCK_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(logits))
        for place in range(0, max(1, len(logits)), size):
            yield logits[place : place + size], [part[place : place + size] for part in parts], start + place

    def add(self, start: int, stop: int, gradient: Tensor) -> None:
        """Takes in the gradient of a chunk's logits."""
        hidden, weight, bias = self.gradients
        with torch.autocast(self._hidden.device.type, enabled=False):
            if hidden is not None:
                if hidden.dtype == self.dtype:
                    torch.mm(gradient, self._weight, out=hidden[start:stop])
                else:
                    hidden[start:stop] = gradient @ self._weight
            if weight is not None:
                if weight.dtype == self.dtype:
                    weight.addmm_(gradient.T, self._hidden[start:stop])
                else:  # each chunk's part is rounded to half precision, their sum is not
                    weight.add_(gradient.T @ self._hidden[start:stop])
            if bias is not None:
                bias.add_(gradient.sum(0))


def _compute_type(hidden: Tensor) -> torch.dtype:
    """The type that logits are computed in."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _parts(others: Sequence[Tensor | Predictions], start: int, stop: int) -> list[Tensor]:
    with torch.no_grad():
        return [
            other.part(start, stop) if isinstance(other, Predictions) else other[start:stop].detach()
            for other in others
        ]


def _wide(logits: Tensor) -> Tensor:
    """Logits of half precision in float32."""
    return logits.to(_wide_type(logits.dtype))


def _wide_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _selected(predictions: Predictions, rows: Tensor) -> Predictions:
    whole = predictions.logits if predictions.logits is not None else predictions.hidden
    assert whole is not None
    return predictions if len(rows) == len(whole) else predictions.select(rows)


def _check_shape(found: Any, inputs: Tensor, whose: str, wanted: str) -> None:
    if not isinstance(found, Tensor) or found.dim() != 3 or found.shape[:2] != inputs.shape:
        shown = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ObjectiveError(
            f"the model gave {shown} for tokens of shape {list(inputs.shape)}; {whose} needs {wanted}."
        )


def _listed(inputs: Tensor) -> str:
    return ", ".join(map(str, inputs.shape))
