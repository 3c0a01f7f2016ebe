"""Chats: questions and answers as a model's template writes them, of which the answers alone are judged."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from instep.data import Data
from instep.data.files import found, unreadable
from instep.data.text import stdlib_sources
from instep.data.tokenizer import FolderTokenizer, Message
from instep.errors import DataError, RecipeError, cut, described

IGNORED = -100
"""The target of tokens that are not judged: all that is no answer."""

PLAIN = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""The template where the tokenizer has none."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MEASURED = 200
"""So many chats say how many bytes a token stands for."""

Rows = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ChatForm:
    """How chats become tokens: a tokenizer and a template, Jinja, by default the tokenizer's own, or `PLAIN`.

    As a codec it takes text for what a user says first, and gives the tokens after which the answer follows.
    """

    tokenizer: FolderTokenizer
    template: str = ""

    @property
    def bytes_per_token(self) -> float:
        return self.tokenizer.bytes_per_token

    @property
    def digest(self) -> str:
        return self.tokenizer.digest

    @property
    def end(self) -> int | None:
        return self.tokenizer.end

    @cached_property
    def used(self) -> str:
        """The template that is used."""
        own = self.tokenizer.of_transformers.chat_template
        return self.template or (own if isinstance(own, str) else "") or PLAIN

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.with_offsets(self.rendered([{"role": "user", "content": text}], asks=True))[0]

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens)

    def save(self, folder: Path) -> None:
        """Copies the tokenizer's files, with the template that is used."""
        self.tokenizer.save(folder)
        (folder / "chat_template.jinja").write_text(self.used, encoding="utf-8")

    def rendered(self, messages: Sequence[Message], *, asks: bool = False) -> str:
        """The text of a chat; with `asks` up to where the next answer begins. Raises DataError."""
        try:
            text: str = self.tokenizer.of_transformers.apply_chat_template(
                list(messages), tokenize=False, chat_template=self.used, add_generation_prompt=asks
            )
        except Exception as error:  # of the template, its own classes, or its language
            raise DataError(f"the template cannot render the chat ({described(error)}); mend one of them.") from error
        return text

    def answers(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The text of a chat, and where in it, in characters, its answers are: [start, end) of each.

        A template says itself where they are by ``{% generation %}``; else an answer is what its turn adds to the text
        that asks for it. Raises DataError where a template shows earlier turns otherwise once others follow.
        """
        if _GENERATION.search(self.used):
            return self._marked(messages)
        whole, spans = self.rendered(messages), list[tuple[int, int]]()
        for place, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self.rendered(messages[:place], asks=True)
                upto = self.rendered(messages[: place + 1])
                if not (whole.startswith(upto) and upto.startswith(before)):
                    raise DataError(
                        f"the template writes the turns before answer {place + 1} otherwise once it is there, so which "
                        f"text is the answer cannot be told; mark answers in the template by {{% generation %}}."
                    )
                spans.append((len(before), len(upto)))
        return whole, spans

    def _marked(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            found: Any = render_jinja_template(
                [[dict(message) for message in messages]], chat_template=self.used,
                return_assistant_tokens_mask=True, **self.tokenizer.of_transformers.special_tokens_map,
            )  # fmt: skip
        except Exception as error:
            raise DataError(f"the template cannot render the chat ({described(error)}); mend one of them.") from error
        (text,), (spans,) = found
        return text, [(start, end) for start, end in spans]

    def tokens(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """The tokens of a chat, and of each whether it is of an answer: has a character of one.

        From the places of characters, not of tokens: where a tokenizer drops white space, a span that ends in some has
        no last token, and transformers' own mask then runs on over the turns that follow.
        """
        text, spans = self.answers(messages)
        tokens, places = self.tokenizer.with_offsets(text)
        judged = [any(start < end and start < to and end > since for since, to in spans) for start, end in places]
        return tokens, judged


class Chats(Dataset[tuple[Tensor, Tensor]]):
    """Chats, lists of messages with "role" and "content". A sample is (inputs, targets), each [T] int64, T < `context`,
    with -100 for targets that are of no answer.

    What is longer than `context` tokens is cut at its end. Raises DataError for a chat of which no answer is left.
    """

    def __init__(self, chats: Sequence[Sequence[Message]], form: ChatForm, context: int):
        if context < 2:
            raise RecipeError(f"the 'context' of chats is {context}; it must be at least 2 tokens.")
        self._chats, self._form, self._context = chats, form, context

    @cached_property
    def digest(self) -> str:
        """That of the chats, with what makes tokens of them."""
        said = json.dumps([[[m["role"], m["content"]] for m in chat] for chat in self._chats])
        how = json.dumps([self._form.digest, self._form.used, self._context])
        return hashlib.sha256(f"{how}\n{said}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._chats)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        tokens, judged = self._form.tokens(self._chats[index])
        tokens, judged = tokens[: self._context], judged[: self._context]
        if not any(judged[1:]):
            raise DataError(
                f"the chat has no answer of an assistant in its first {self._context} tokens, so there is nothing to "
                f"learn from; raise the data's 'context', or give it an answer"
            )
        whole = torch.tensor(tokens, dtype=torch.int64)
        return whole[:-1], whole[1:].masked_fill(~torch.tensor(judged[1:]), IGNORED)


def padded(samples: Rows) -> tuple[Tensor, Tensor]:
    """A batch (inputs, targets), each [B, T], of samples of several lengths, -100 after their ends."""
    inputs, targets = (
        pad_sequence(list(parts), batch_first=True, padding_value=IGNORED) for parts in zip(*samples, strict=True)
    )
    return inputs, targets


def chat_files(
    pattern: str | Sequence[str], tokenizer: str = "", context: int = 1024, held_out: float = 0.05, template: str = ""
) -> Data:
    """Chats in JSONL files, one a line: {"messages": [{"role": "user", "content": ...}, ...]}.

    pattern: one glob or several; lines follow each other in order of the files' paths.
    tokenizer: the folder that has it, most often the model's. template: a file of a Jinja template in place of its own.
    held_out: share of the chats, the last ones.
    Raises DataError where no chat is found, or a line is none, and RecipeError for a bad share.
    """
    if not 0 < held_out < 1:
        raise RecipeError(f"'held_out' is {held_out}; it is a share of the chats, above 0 and below 1.")
    paths = found(pattern)
    chats = [chat for path in paths for chat in _read(path)]
    count = max(1, int(len(chats) * held_out))
    if len(chats) <= count:
        raise DataError(
            f"{len(chats)} chats are in {len(paths)} files, {paths[0]} the first, too few to train on and to hold out; "
            f"give more."
        )
    return _data(chats[:-count], chats[-count:], tokenizer, context, _template(template))


def docstrings(tokenizer: str = "", context: int = 256, samples: int = 20_000) -> Data:
    """Chats from the source of Python's standard library: a function's first line, and its docstring as the answer.

    At most `samples` to train on. Those of whole modules are held out, as in `instep.data.text.stdlib_text`. Raises
    DataError.
    """
    train, held_out = stdlib_sources()
    chats = [_docstrings(part) for part in (train, held_out)]
    for part in chats:  # so that the first few are a fair sample of all
        random.Random(0).shuffle(part)
    return _data(chats[0][:samples], chats[1], tokenizer, context, "")


_DOCSTRING = re.compile(rb'^[ ]*(def \w+\([^\n]{0,150}\)[^\n:]{0,40}:)\n[ ]+"""([^"\\]{10,400}?)"""\n', re.MULTILINE)


def _docstrings(sources: Sequence[bytes]) -> list[list[Message]]:
    return [
        [
            {"role": "user", "content": match[1].decode("utf-8", errors="replace")},
            {"role": "assistant", "content": _first_paragraph(match[2].decode("utf-8", errors="replace"))},
        ]
        for source in sources
        for match in _DOCSTRING.finditer(source)
    ]


def _first_paragraph(text: str) -> str:
    return " ".join(text.strip().split("\n\n")[0].split())


def _data(
    train: Sequence[Sequence[Message]], held_out: Sequence[Sequence[Message]], folder: str, context: int, template: str
) -> Data:
    form = ChatForm(FolderTokenizer(folder), template)
    texts = [form.rendered(chat) for chat in train[:_MEASURED]]
    form = ChatForm(form.tokenizer.measured(texts), template)
    return Data(Chats(train, form, context), Chats(held_out, form, context), collate=padded, codec=form)


def _template(path: str) -> str:
    if not path:
        return ""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise unreadable(Path(path), error) from None


def _read(path: Path) -> list[list[Message]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise unreadable(path, error) from None
    return [_chat(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _chat(line: bytes, where: str) -> list[Message]:
    try:
        table = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is no JSON: {cut(error)}; mend it, or leave the line out.") from None
    messages = table.get("messages") if isinstance(table, Mapping) else None
    sound = (
        isinstance(messages, list)
        and messages
        and all(
            isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
    )
    if not sound or not isinstance(messages, list):
        raise DataError(f'{where} is no chat; write it as {{"messages": [{{"role": "user", "content": "..."}}, ...]}}.')
    chat: list[Any] = messages
    return chat
