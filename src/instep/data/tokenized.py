"""What lies beside a token file that ``instep tokenize`` made: how it was made, and the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instep.data.tokenizer import FolderTokenizer, digest_of
from instep.errors import DataError

FORMAT = "instep tokens 1"


@dataclass(frozen=True)
class Known:
    """Of token files: the codec, and the number that each token is below. None and 0 where nothing is known."""

    codec: FolderTokenizer | None = None
    vocabulary: int = 0


def beside(path: Path) -> Path:
    """The file that says of a token file how it was made."""
    return path.with_suffix(".json")


def known(files: Sequence[tuple[Path, int]]) -> Known:
    """What is said of all these files, each with its count of tokens; nothing unless each was made so.

    Raises DataError where a file is not that which was made, the tokenizer beside is another, or files have several.
    """
    said = [(path, found) for path, count in files if (found := _said(path, count)) is not None]
    if not said:
        return Known()
    first, table = said[0]
    for path, other in said:
        if other["tokenizer"] != table["tokenizer"]:
            raise DataError(
                f"{path} is of another tokenizer (digest {other['tokenizer'][:12]}) than {first} "
                f"({table['tokenizer'][:12]}), so that one token means two things; make them with one tokenizer."
            )
    if len(said) < len(files):
        return Known()
    folder = first.with_suffix(".tokenizer")
    if (digest := digest_of(folder)) != table["tokenizer"]:
        what = "is not there" if digest is None else f"is another one (digest {digest[:12]})"
        raise DataError(
            f"the tokenizer of {first} (digest {table['tokenizer'][:12]}) {what} in {folder}; put it back, as "
            f"'instep tokenize' wrote it."
        )
    tokens = sum(other["tokens"] for _, other in said)
    text = sum(other["text_bytes"] for _, other in said)
    return Known(FolderTokenizer(str(folder), text / tokens), max(other["vocabulary"] for _, other in said))


def _said(path: Path, count: int) -> dict[str, Any] | None:
    """What the file beside says, if it is one of these."""
    try:
        table = json.loads(beside(path).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        return None
    if table["tokens"] != count:
        raise DataError(
            f"{path} has {count:,} tokens, and {beside(path)} beside it tells of {table['tokens']:,}; put the file "
            f"back that was made with it, or make both anew."
        )
    return table
