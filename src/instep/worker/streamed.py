"""A worker's own weights, under rules whose contributions are fragments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from instep.reduce.layout import Layout, Pack
from instep.rules.fragments import Fragments


class Streamed:
    """What a worker has between two contributions, beside its replica's weights.

    Each of its deltas is against the value that the fragment had when the worker last pulled or sent it, so that what
    it has moved is sent once, also where it takes a second piece of a round for a worker that left.

    mix: the part of its own value of a fragment that it keeps when it pulls another. The next delta is against what was
    pulled, as in DiLoCo: what it has kept counts as moved.
    """

    def __init__(self, parameters: Sequence[Tensor], layout: Layout, fragments: Fragments, mix: float = 0.0):
        self._parameters, self._layout, self._fragments, self._mix = parameters, layout, fragments, mix
        self._since: list[Tensor] = []  # by parameter: what its next delta is against; none before the first pull
        self._version = 0  # of the weights that were pulled last

    def pull(self, pack: Pack, saved: Tensor, version: int) -> None:
        """Takes the weights of `version` ([pack.size_bytes] uint8): all of them at first, and then the fragments that
        updates have changed since; buffers and frozen parameters each time.
        """
        if not self._since:
            pack.load(saved)
            self._since = [parameter.detach().clone() for parameter in self._parameters]
        else:
            changed = self._fragments.since(self._version, version)
            own = [self._parameters[index].detach().clone() for index in changed] if self._mix else []
            pack.load(saved, changed)
            self._note(changed)
            with torch.no_grad():
                for index, kept in zip(changed, own, strict=bool(own)):
                    self._parameters[index].add_(kept - self._parameters[index], alpha=self._mix)  # equal ones stay
        self._version = version

    def send(self, fragment: range, row: Tensor) -> None:
        """Writes the delta of a fragment into `row` ([layout.size] float32, zero elsewhere)."""
        views = self._layout.views(row)
        with torch.no_grad():
            for index in fragment:
                view, before, parameter = views[index], self._since[index], self._parameters[index]
                torch.sub(before.to(view.dtype), parameter.to(view.dtype), out=view)
        self._note(fragment)

    def _note(self, which: Sequence[int]) -> None:
        with torch.no_grad():
            for index in which:
                self._since[index].copy_(self._parameters[index])
