"""Chats: questions and answers as a model's template writes them, of which the answers alone are judged."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from instep.data import Collate, Data, MapStyle
from instep.data.files import unreadable
from instep.data.lines import jsonl
from instep.data.order import Groups
from instep.data.text import stdlib_sources
from instep.data.tokenizer import FolderTokenizer, Message
from instep.errors import DataError, RecipeError, described

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
        if isinstance(own, Mapping):  # of several, by name
            own = own.get("default")
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

    def tokens(self, messages: Sequence[Message], given: int = 0) -> tuple[list[int], list[bool]]:
        """The tokens of a chat, and of each whether it is of an answer after the first `given`.

        From the places of characters, not of tokens: where a tokenizer drops white space, a span that ends in some has
        no last token, and transformers' own mask then runs on over the turns that follow. Where it leaves spaces out of
        the places of tokens, those of spaces alone are at the end of theirs, and of no length.
        """
        text, found = self.answers(messages)
        spans = found[given:]
        tokens, places = self.tokenizer.with_offsets(text)
        return tokens, [
            any(since < end and (start < to or start == end == to) for since, to in spans) for start, end in places
        ]


@dataclass(frozen=True)
class ChatSample:
    """Makes a sample of a chat: (inputs, targets), each [T] int64, T < `context`, with -100 for targets of no answer.

    A chat is a list of messages with "role" and "content", or a table that has it as "messages". What is longer than
    `context` tokens is cut at its end. Raises DataError for a chat of which no answer is left.
    """

    form: ChatForm
    context: int

    def __post_init__(self) -> None:
        if self.context < 2:
            raise RecipeError(f"the 'context' of chats is {self.context}; it must be at least 2 tokens.")

    def __call__(self, value: Any) -> tuple[Tensor, Tensor]:
        return self.judged(messages_of(value))

    def judged(self, messages: Sequence[Message], given: int = 0) -> tuple[Tensor, Tensor]:
        """The sample, of whose answers the first `given` are not judged."""
        tokens, kept = self.form.tokens(messages, given)
        tokens, kept = tokens[: self.context], kept[: self.context]
        if not any(kept[1:]):
            raise DataError(
                f"the chat has no answer of an assistant in its first {self.context} tokens, so there is nothing to "
                f"learn from; raise the data's 'context', or give it an answer"
            )
        whole = torch.tensor(tokens, dtype=torch.int64)
        return whole[:-1], whole[1:].masked_fill(~torch.tensor(kept[1:]), IGNORED)

    @property
    def digest(self) -> str:
        """Text that changes with what samples are made of the same chats."""
        return json.dumps([type(self).__name__, self.form.digest, self.form.used, self.context])


class PreferenceSample(ChatSample):
    """Makes a pair of what two answers are worth, for `instep.objectives.preference.DPO`: "chosen" and "rejected" are
    mapped to samples as `ChatSample` makes them, in which what both have in common is not judged.

    A pair is a table {"prompt", "chosen", "rejected"}, of texts, or of lists of messages, whose prompt may also stand
    at the beginning of both.
    """

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, Mapping) or not {"chosen", "rejected"} <= set(value):
            raise DataError(
                'a pair is to be {"prompt": ..., "chosen": ..., "rejected": ...}, each text or a list of messages'
            )
        prompt = _turns(value.get("prompt", []), "user")
        sides = {name: [*prompt, *_turns(value[name], "assistant")] for name in ("chosen", "rejected")}
        common = list(takewhile(lambda turns: turns[0] == turns[1], zip(*sides.values(), strict=False)))
        given = sum(one["role"] == "assistant" for one, _ in common)
        return {name: self.judged(messages, given) for name, messages in sides.items()}


class ChatSet(Dataset[Any]):
    """Samples that `make` makes of `values`, or, with `made`, has made of them already."""

    def __init__(self, values: MapStyle, make: ChatSample, *, made: bool = False) -> None:
        self._values, self._make, self._made = values, make, made

    @cached_property
    def digest(self) -> str:
        """That of the values, with what makes samples of them."""
        own = getattr(self._values, "digest", None)
        if not isinstance(own, str):
            own = json.dumps([self._values[index] for index in range(len(self._values))])
        return hashlib.sha256(f"{self._make.digest}\n{own}".encode()).hexdigest()

    @property
    def groups(self) -> Groups | None:
        """Those of the values, such as row groups."""
        found = getattr(self._values, "groups", None)
        return found if isinstance(found, Groups) else None

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: int) -> Any:
        return self._values[index] if self._made else self._make(self._values[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        several = getattr(self._values, "__getitems__", None) if self._made else None
        return list(several(indices)) if several is not None else [self[index] for index in indices]


def padded(samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A batch (inputs, targets), each [B, T], of samples of several lengths, -100 after their ends."""
    inputs, targets = (
        pad_sequence(list(parts), batch_first=True, padding_value=IGNORED) for parts in zip(*samples, strict=True)
    )
    return inputs, targets


def paired(samples: Sequence[Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """A batch of pairs: "chosen" and "rejected", each as `padded`."""
    return {side: padded([sample[side] for sample in samples]) for side in ("chosen", "rejected")}


def chat_files(
    pattern: str | Sequence[str], tokenizer: str = "", context: int = 1024, held_out: float | str = 0.05,
    template: str = "", index: str | None = None,
) -> Data:  # fmt: skip
    """Chats in JSONL files, one a line: {"messages": [{"role": "user", "content": ...}, ...]}.

    tokenizer: the folder that has it, most often the model's. template: a file of a Jinja template in place of its own.
    pattern, held_out, index: as `instep.data.lines.jsonl`. Raises DataError and RecipeError as that, and for a line
    that is no chat when it is read.
    """
    return chats(partial(jsonl, pattern, held_out, index=index), tokenizer, context, template)


def preference_files(
    pattern: str | Sequence[str], tokenizer: str = "", context: int = 1024, held_out: float | str = 0.05,
    template: str = "", index: str | None = None,
) -> Data:  # fmt: skip
    """Pairs of answers in JSONL files, one a line, as `PreferenceSample` reads them; all else as `chat_files`."""
    read = partial(jsonl, pattern, held_out, index=index)
    return _read(read, PreferenceSample(_form(tokenizer, template), context), paired)


def chats(read: Callable[..., Data], tokenizer: str = "", context: int = 1024, template: str = "") -> Data:
    """Chats in files of any format: `read` is called with ``map``, ``collate`` and ``codec``, as in

    ``args.read = {use = "instep.data.parquet:parquet", args = {pattern = "chats/*.parquet"}}``.
    """
    return _read(read, ChatSample(_form(tokenizer, template), context), padded)


def _read(read: Callable[..., Data], make: ChatSample, collate: Collate) -> Data:
    data = read(map=make, collate=collate, codec=make.form)
    held_out = None if data.held_out is None else ChatSet(data.held_out, make, made=True)
    return _measured(ChatSet(data.train, make, made=True), held_out, make, collate)


def _measured(train: ChatSet, held_out: ChatSet | None, make: ChatSample, collate: Collate) -> Data:
    """The data, with the bytes of a token as the first samples have it."""
    tokens = list[int]()
    for index in range(min(len(train), _MEASURED)):
        with suppress(DataError):  # it is told of where it is trained on, or left out
            sample = train[index]
            tokens += (sample["chosen"] if isinstance(sample, Mapping) else sample)[0].tolist()
    size = len(make.form.decode(tokens).encode())
    tokenizer = replace(make.form.tokenizer, bytes_per_token=size / len(tokens) if tokens else 1.0)
    return Data(train, held_out, collate, replace(make.form, tokenizer=tokenizer))


def docstrings(tokenizer: str = "", context: int = 256, samples: int = 20_000) -> Data:
    """Chats from the source of Python's standard library: a function's first line, and its docstring as the answer.

    At most `samples` to train on. Those of whole modules are held out, as in `instep.data.text.stdlib_text`. Raises
    DataError.
    """
    train, held_out = stdlib_sources()
    found = [_docstrings(part) for part in (train, held_out)]
    for part in found:  # so that the first few are a fair sample of all
        random.Random(0).shuffle(part)
    make = ChatSample(_form(tokenizer, ""), context)
    return _measured(ChatSet(found[0][:samples], make), ChatSet(found[1], make), make, padded)


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


def _form(folder: str, template: str) -> ChatForm:
    try:
        text = Path(template).expanduser().read_text(encoding="utf-8") if template else ""
    except OSError as error:
        raise unreadable(Path(template), error) from None
    return ChatForm(FolderTokenizer(folder), text)


def messages_of(value: Any) -> list[Message]:
    """The messages of a chat, or of a table that has them as "messages". Raises DataError."""
    messages = value.get("messages") if isinstance(value, Mapping) else value
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise DataError('a chat is to be {"messages": [{"role": "user", "content": "..."}, ...]}')
    found: list[Message] = messages
    return found


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _turns(value: Any, role: str) -> list[Message]:
    """Messages as they are, or a text as the one of `role`; of nothing, none."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return messages_of(value) if value else []
