"""A tokenizer of the library `tokenizers`, from its file: trained here or taken, with the token that ends a text."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from instep.data.tokenizer import FILES, copy_tokenizer, digest_of
from instep.errors import ComponentError, DataError, cut, described, shown

END_OF_TEXT = "<|endoftext|>"
"""The token that ends a text in a tokenizer that is trained here."""

NO_SEPARATOR = "none"

LEAST = 257
"""Tokens of the smallest vocabulary that is trained: bytes, and the end of a text."""

_FILE, _CONFIG = FILES[0], FILES[1]

_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")
"""What ends a text in tokenizers whose configuration is not there."""

_THREADS = "TOKENIZERS_PARALLELISM"


class Encoder:
    """The tokenizer in `folder`. Raises DataError where it has none that gives a text the same tokens each time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        digest = digest_of(folder)
        if digest is None:
            raise DataError(f"{folder} (from {os.getcwd()}) has no {_FILE}; give a tokenizer's folder or its file.")
        self.digest = digest
        model = json.loads((folder / _FILE).read_bytes()).get("model") or {}
        if isinstance(model, dict) and model.get("dropout"):
            raise DataError(
                f"the tokenizer in {folder} leaves merges out by chance (dropout {cut(model['dropout'])}), so that a "
                f"text would have other tokens each time; set its 'dropout' to null."
            )

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = _library().Tokenizer
        try:
            found = tokenizer.from_file(str(self.folder / _FILE))
        except Exception as error:  # the library raises Exception itself
            raise DataError(
                f"{self.folder / _FILE} cannot be loaded ({described(error)}); check that it is a tokenizer's."
            ) from error
        found.no_padding()
        found.no_truncation()
        return found

    @cached_property
    def vocabulary(self) -> int:
        """Every token is below it."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def separator(self, asked: str | None) -> int | None:
        """The token of this text that ends a document, by default the one of the tokenizer; None for none. Raises
        DataError where it is none.
        """
        if asked == NO_SEPARATOR:
            return None
        name = self.end if asked is None else asked
        if name is None:
            return None
        token: int | None = self._tokenizer.token_to_id(name)
        if token is None:
            raise DataError(
                f"the tokenizer has no token {shown(name)} to end a document with; name one that it has with "
                f"--separator, or none."
            )
        return token

    @property
    def end(self) -> str | None:
        """The text of the token that ends a text, as its configuration says it or else by its usual names."""
        with contextlib.suppress(OSError, ValueError):
            said = json.loads((self.folder / _CONFIG).read_bytes()).get("eos_token")
            name = said.get("content") if isinstance(said, dict) else said
            return name if isinstance(name, str) else None
        return next((name for name in _ENDS if self._tokenizer.token_to_id(name) is not None), None)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, nothing put before or after."""
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [each.ids for each in found]


def train(texts: Iterable[str], vocabulary: int, end: str | None, folder: Path) -> None:
    """Trains a byte-level BPE and writes it into `folder`; the same texts give the same file.

    vocabulary: tokens at most; texts that have too few pairs give fewer. end: the token that ends a text, which then
    is token 0; None for none. Raises ComponentError, OSError.
    """
    library = _library()
    plain = library.Tokenizer(library.models.BPE())
    plain.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[] if end is None else [end], show_progress=False,
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    plain.train_from_iterator(iter(texts), trainer)
    _write_config(folder, end)
    aside = folder / f"{_FILE}.new"
    aside.write_text(plain.to_str(), encoding="utf-8")
    os.replace(aside, folder / _FILE)


def take(given: Path, folder: Path) -> None:
    """Copies a tokenizer, a file or a folder, into `folder`. Raises DataError where there is none, OSError."""
    given = given.expanduser()
    if given.is_file() and given.name != _FILE:
        shutil.copyfile(given, folder / _FILE)
        end = Encoder(folder).end
        if end is not None:
            _write_config(folder, end)
        return
    source = given.parent if given.is_file() else given
    if not (source / _FILE).is_file():
        raise DataError(
            f"there is no tokenizer at {cut(given)} (from {os.getcwd()}); give a file such as {_FILE}, a folder that "
            f"has it, or --train 8192 to train one."
        )
    copy_tokenizer(source, folder)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """The library starts no threads in the block: a process that has such is not to be forked."""
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_THREADS]
        else:
            os.environ[_THREADS] = before


def _write_config(folder: Path, end: str | None) -> None:
    """For transformers."""
    table = {"tokenizer_class": "PreTrainedTokenizerFast"} | ({} if end is None else {"eos_token": end})
    (folder / _CONFIG).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def _library() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError:
        raise ComponentError(
            "texts are made tokens by the library tokenizers, which is not installed; install it with: "
            "pip install 'instep[hf]'."
        ) from None
    return tokenizers
