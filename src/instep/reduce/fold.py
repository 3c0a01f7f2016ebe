"""Folding: one worker's microbatch gradients into the tree nodes that it owns, during backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from instep.errors import RecipeError
from instep.reduce.layout import Layout
from instep.reduce.tree import Leaf, Node, fold_plan


class Fold:
    """Adds gradients, one microbatch after the other, into one flat float32 vector a node.

    Each gradient is taken the moment autograd has finished it, copied or added into place, and freed, so that a
    worker never holds the gradients of a whole microbatch beside the sums. A parameter without a gradient in a
    microbatch counts as zeros there. One whose gradient comes in parts, as reentrant checkpointing of shared weights
    gives it, is held until the microbatch's end: its parts must be added up before they are added to anything else.

    `nodes` are the worker's maximal nodes from left to right and `slots` their flat vectors ([layout.size], float32).
    Beside these, a stack of at most ``log2(M) - 1`` private vectors is held.
    """

    def __init__(self, layout: Layout, parameters: Sequence[Tensor], nodes: Sequence[Node], slots: Sequence[Tensor]):
        self._layout = layout
        self.assign(nodes, slots)
        self._scratch: list[tuple[Tensor, list[Tensor]]] = []
        self._stack: list[tuple[Tensor, list[Tensor]]] = []
        self._spare: tuple[Tensor, list[Tensor]] | None = None
        self._device = parameters[0].device
        self._next = 0
        self._unscale = 1.0
        self._add = False
        self._parts = [0] * len(parameters)  # of the present microbatch
        self._most_parts = [0] * len(parameters)  # of any; 0 while no gradient was seen
        self._held: dict[int, Tensor] = {}
        self._pieces: Sequence[slice] = ()
        self._pieces_of: list[list[int]] = []  # by parameter
        self._lacking: list[int] = []  # by piece, the parameters that it waits for, in the last leaf
        self._reached: Callable[[int], None] = lambda done: None
        self._last = False
        self._done = 0
        self.touched = [False] * len(parameters)
        """Whether each parameter had a gradient in any microbatch since `begin`."""
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(index))
            for index, parameter in enumerate(parameters)
        ]

    def assign(self, nodes: Sequence[Node], slots: Sequence[Tensor]) -> None:
        """From the next `begin` on, folds into other nodes, or into other vectors."""
        self.slots = slots
        """The vectors of the nodes, from left to right."""
        self._slots = [(slot, self._layout.views(slot)) for slot in slots]
        self._plan: list[tuple[int, Leaf]] = [
            (slot, leaf) for slot, node in enumerate(nodes) for leaf in fold_plan(*node)
        ]

    def tell(self, pieces: Sequence[slice], reached: Callable[[int], None]) -> None:
        """From the next `begin` on, calls `reached(n)` when the first n pieces of the last node's vector are finished:
        after each gradient of its last backward, whether n has grown or not, and at the end.

        pieces: of the vector, in elements; together they are all of it.
        """
        self._pieces, self._reached = pieces, reached
        sizes = map(math.prod, self._layout.shapes)
        ends = [offset + size for offset, size in zip(self._layout.offsets, sizes, strict=True)]
        self._pieces_of = [
            [i for i, piece in enumerate(pieces) if piece.start < end and offset < piece.stop]
            for offset, end in zip(self._layout.offsets, ends, strict=True)
        ]

    def begin(self, scale: float = 1.0) -> None:
        """Starts a step. scale: a power of two that its gradients come multiplied by, and are divided by in float32."""
        self._unscale = 1 / scale
        self._next = self._done = 0
        self._stack = []
        self.touched = [False] * len(self.touched)

    def begin_leaf(self) -> None:
        """Before the backward of the next microbatch."""
        slot, leaf = self._plan[self._next]
        self._add = leaf.add
        self._last = bool(self._pieces) and self._next == len(self._plan) - 1
        if self._last:
            self._lacking = [0] * len(self._pieces)
            for pieces in self._pieces_of:
                for piece in pieces:
                    self._lacking[piece] += 1
        self._parts = [0] * len(self._parts)
        if not leaf.add:
            self._stack.append(self._buffer(slot, len(self._stack)))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """In the block, before a step, there is one leaf alone, whose pieces nobody is told of: in the first vector, or
        where there is none in one of its own.
        """
        slots, plan, pieces = self._slots, self._plan, self._pieces
        self._slots = slots or [self._spare_vector()]
        self._plan, self._pieces = [(0, Leaf(add=False, merges=0))], ()
        self.begin()
        try:
            yield
        finally:
            self._slots, self._plan, self._pieces = slots, plan, pieces

    def _spare_vector(self) -> tuple[Tensor, list[Tensor]]:
        if self._spare is None:
            flat = torch.zeros(self._layout.size, device=self._device)
            self._spare = flat, self._layout.views(flat)
        return self._spare

    def end_leaf(self) -> None:
        """After the backward, or instead of it for a microbatch without samples."""
        _, leaf = self._plan[self._next]
        views = self._stack[-1][1]
        for index, gradient in self._held.items():
            views[index].add_(gradient)
        self._held = {}
        for index, parts in enumerate(self._parts):
            if parts:
                self.touched[index] = True
                self._most_parts[index] = max(parts, self._most_parts[index])
            elif self._add:
                views[index].add_(0.0)  # -0.0 + 0.0 is 0.0, as it is wherever else this leaf is added
            else:
                views[index].zero_()  # what lies there is of an earlier step
        if self._last:  # all that is on the stack is merged, piece by piece
            self._finish(len(self._pieces))
            del self._stack[1:]
            self._last = False
        else:
            for _ in range(leaf.merges):
                top = self._stack.pop()
                self._stack[-1][0].add_(top[0])
        self._next += 1
        if self._next == len(self._plan) or self._plan[self._next][0] != self._plan[self._next - 1][0]:
            assert len(self._stack) == 1, "a finished node leaves one vector"
            self._stack = []

    def close(self) -> None:
        """Takes the hooks off the parameters."""
        for handle in self._handles:
            handle.remove()

    def _buffer(self, slot: int, depth: int) -> tuple[Tensor, list[Tensor]]:
        if depth == 0:
            return self._slots[slot]
        while len(self._scratch) < depth:
            flat = torch.zeros_like(self._slots[slot][0])
            self._scratch.append((flat, self._layout.views(flat)))
        return self._scratch[depth - 1]

    def _came(self, index: int) -> None:
        """A parameter's gradient is in the last leaf of the step, and is whole."""
        for piece in self._pieces_of[index]:
            self._lacking[piece] -= 1
        done = self._done
        while done < len(self._pieces) and not self._lacking[done]:
            done += 1
        self._finish(done)

    def _finish(self, until: int) -> None:
        """Finishes the pieces before this one."""
        for piece in self._pieces[self._done : until]:
            for depth in range(len(self._stack) - 1, 0, -1):
                self._stack[depth - 1][0][piece].add_(self._stack[depth][0][piece])
        self._done = until
        self._reached(until)

    def _hook(self, index: int):  # type: ignore[no-untyped-def]
        def take(parameter: Tensor) -> None:
            gradient = parameter.grad
            if gradient is None:  # it ceased to require one after the forward had used it
                return
            parameter.grad = None
            if gradient.is_sparse:
                gradient = gradient.to_dense()
            if self._unscale != 1.0:  # each by itself, so that a leaf is one number wherever it is added
                gradient = gradient.float().mul_(self._unscale)
            view = self._stack[-1][1][index]
            first = self._parts[index] == 0
            self._parts[index] += 1
            if not first and self._done and min(self._pieces_of[index]) < self._done:
                raise _in_parts(parameter)  # what is on its way cannot be changed
            # A leaf is one number, rounded once all its parts are in it: ((s + p) + q) is not (s + (p + q)). So what is
            # added to a sum is added at once only where it was seen to come whole.
            if not self._add:
                view.copy_(gradient) if first else view.add_(gradient.float())
            elif self._most_parts[index] != 1:
                self._held[index] = gradient.float() if first else self._held[index] + gradient.float()
            elif first:
                view.add_(gradient.float())
            else:
                raise _in_parts(parameter)
            if self._last and self._most_parts[index] == 1 and first:
                self._came(index)

        return take


def _in_parts(parameter: Tensor) -> RecipeError:
    return RecipeError(
        f"the gradient of a parameter of shape {list(parameter.shape)} came in several parts, and in one part in a "
        f"microbatch before, so that its sum would depend on the team; where the model calls torch.utils.checkpoint, "
        f"set use_reentrant to False."
    )
