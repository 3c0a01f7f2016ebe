"""Tokenizers as `transformers` has them, from a folder of this machine, and the one of bytes in its form."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from instep.errors import DataError, cut, described
from instep.hf_library import no_extra, quiet_transformers

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip
"""What a folder may have of a tokenizer."""

_FILE = FILES[0]

BYTES = "bytes"
"""The digest of the tokenizer of bytes."""

Message = Mapping[str, Any]
"""One turn: its "role", such as "user" or "assistant", and its "content", text."""


@dataclass(frozen=True)
class FolderTokenizer:
    """The tokenizer in `folder`, as a codec. Needs the extra ``hf``. It is loaded when it is first used.

    bytes_per_token: of the data that it is used for.
    Raises DataError where the folder has none, or it cannot be loaded.
    """

    folder: str
    bytes_per_token: float = 1.0

    def __post_init__(self) -> None:
        if not self.folder:
            raise DataError(
                "no folder was named to take the tokenizer from, which most often is the model's; give one, such as "
                "that which recipe hf leaves, by --recipe.model.args.folder runs/hf/artifacts/hf, or as the data's "
                "'tokenizer'."
            )
        place = Path(self.folder).expanduser()
        if not (place / _FILE).is_file():
            raise DataError(
                f"{cut(place)} (from {os.getcwd()}) has no {_FILE}, so there is no tokenizer to read texts with; "
                f"give a folder that has one: it must be the tokenizer that the model was trained with."
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return (FolderTokenizer, (self.folder, self.bytes_per_token))

    @cached_property
    def of_transformers(self) -> Any:
        """The tokenizer itself."""
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise no_extra() from None
        try:
            with quiet_transformers():
                return AutoTokenizer.from_pretrained(
                    Path(self.folder).expanduser(), local_files_only=True, trust_remote_code=False
                )
        except Exception as error:  # its own classes of errors differ from version to version
            raise DataError(
                f"transformers cannot load the tokenizer in {cut(self.folder)} ({described(error)}); check its files."
            ) from error

    @property
    def vocabulary(self) -> int:
        """How many tokens it knows; their numbers are below."""
        return len(self.of_transformers)

    @property
    def end(self) -> int | None:
        """The token that ends a text, if there is one."""
        found: int | None = self.of_transformers.eos_token_id
        return found

    @cached_property
    def digest(self) -> str:
        """See `digest_of`."""
        found = digest_of(Path(self.folder).expanduser())
        assert found is not None, "it was there when this was made"
        return found

    def encode(self, text: str) -> list[int]:
        """The tokens of a text that goes on: with what the tokenizer puts before one, without what it puts after."""
        tokens: list[int] = self.of_transformers.encode(text)
        return tokens[:-1] if tokens[1:] and tokens[-1] == self.end else tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, those that mark turns or ends too."""
        text: str = self.of_transformers.decode(list(tokens), clean_up_tokenization_spaces=False)
        return text

    def with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The tokens of `text`, nothing put before or after, and where in it, in characters, each comes from."""
        found = self.of_transformers(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(found["input_ids"]), [tuple(pair) for pair in found["offset_mapping"]]

    def save(self, folder: Path) -> None:
        """Copies its files."""
        copy_tokenizer(Path(self.folder).expanduser(), folder)


def digest_of(folder: Path) -> str | None:
    """SHA-256 of the content of a folder's tokenizer.json, however it is written; None where there is none.

    Two tokenizers of one digest give every text the same tokens. What a program sets for itself, padding and
    truncation, is left out. That of bytes, see `save_bytes`, is `BYTES`. Raises DataError for a file that is damaged.
    """
    try:
        table = json.loads((folder / _FILE).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / _FILE} is no file of a tokenizer: {cut(error)}; load it again.") from None
    if not isinstance(table, dict):
        raise DataError(f"{folder / _FILE} is no file of a tokenizer; load it again.")
    model = table.get("model")
    around = table.get("post_processor") or {}
    plain = not (table.get("added_tokens") or table.get("normalizer") or around.get("special_tokens"))
    if plain and isinstance(model, dict) and not model.get("merges") and model.get("vocab") == _numbers():
        return BYTES
    kept = {key: value for key, value in table.items() if key not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def copy_tokenizer(source: Path, folder: Path) -> list[str]:
    """Copies what the folder `source` has of a tokenizer into `folder`; the names of these files."""
    names = [name for name in FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, folder / name)
    return names


def save_bytes(folder: Path) -> None:
    """Writes the tokenizer of bytes into `folder`: token 0 to 255 is the byte of that number, text is UTF-8."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.BPE(vocab=_numbers(), merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(folder)


def _numbers() -> dict[str, int]:
    """The byte that each sign stands for in files of byte-level tokenizers: the byte's own, or from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
