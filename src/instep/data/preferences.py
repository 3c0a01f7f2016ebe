"""Pairs of texts of which one is preferred: real ones against the same words in another order."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.data import Dataset

from instep.data import Data
from instep.data.text import Windows, stdlib_text
from instep.errors import RecipeError

IGNORED = -100
"""The target of tokens that are not judged: those of the prompt."""

_WORDS = re.compile(rb"\w+|\s+|[^\w\s]")

Pair = dict[str, tuple[Tensor, Tensor]]


class Shuffled(Dataset[Pair]):
    """Pairs made of windows of text: a prompt with the bytes that follow it, and with their words shuffled.

    A sample maps "chosen" and "rejected" to (inputs, targets), each [T], int64, of T + 1 bytes; targets in the prompt
    are -100. Words, gaps and signs are shuffled by the window's place alone. At most `samples` windows are used, evenly
    spread; those where shuffling changes nothing are left out.
    """

    def __init__(self, windows: Windows, prompt: int, samples: int) -> None:
        length = windows.context + 1
        if not 1 <= prompt < length:
            raise RecipeError(f"a 'prompt' of {prompt} bytes does not fit texts of {length}; make it shorter.")
        if samples < 1:
            raise RecipeError(f"{samples} 'samples' are no pairs to train on or hold out; it must be at least 1.")
        self._windows, self._prompt = windows, prompt
        places = range(0, len(windows), max(1, len(windows) // samples))
        self._kept = [place for place in places[:samples] if self._distinct(place)]

    @cached_property
    def digest(self) -> str:
        """That of the text, with what makes pairs of it."""
        return f"{self._windows.digest}/{self._windows.context}/{self._prompt}/{len(self)}"

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Pair:
        place = self._kept[index]
        text = bytes(self._windows[place].tolist())
        return {"chosen": self._judged(text), "rejected": self._judged(self._other(text, place))}

    def _judged(self, text: bytes) -> tuple[Tensor, Tensor]:
        tokens = torch.tensor(list(text), dtype=torch.int64)
        targets = tokens[1:].clone()
        targets[: self._prompt - 1] = IGNORED
        return tokens[:-1], targets

    def _other(self, text: bytes, place: int) -> bytes:
        words: Sequence[bytes] = _WORDS.findall(text[self._prompt :])
        return text[: self._prompt] + b"".join(random.Random(place).sample(words, len(words)))

    def _distinct(self, place: int) -> bool:
        text = bytes(self._windows[place].tolist())
        return self._other(text, place) != text


def shuffled_text(prompt: int = 32, continuation: int = 64, samples: int = 20_000, held_out: int = 1_000) -> Data:
    """Preference pairs from the source of Python's standard library: the real continuation against a shuffled one.

    prompt, continuation: bytes. samples, held_out: how many pairs there are at most; the held-out ones are of modules
    that are not trained on, as in `instep.data.text.stdlib_text`. Raises DataError and RecipeError.
    """
    text = stdlib_text(prompt + continuation - 1)
    parts = []
    for windows, count in ((text.train, samples), (text.held_out, held_out)):
        assert isinstance(windows, Windows)
        parts.append(Shuffled(windows, prompt, count))
    train, rest = parts
    return Data(train, rest)
