"""Chats: the answers are judged, all of each, and nothing else, whatever the template and the tokenizer."""

from __future__ import annotations

import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from instep.data.chats import (
    PLAIN,
    ChatForm,
    ChatSample,
    ChatSet,
    PreferenceSample,
    chat_files,
    chats,
    docstrings,
    padded,
    paired,
    preference_files,
)  # fmt: skip
from instep.data.order import Groups
from instep.data.tokenizer import BYTES, FolderTokenizer, digest_of, save_bytes
from instep.errors import DataError, RecipeError
from instep.models import GPT
from instep.objectives.language import NextToken
from instep.objectives.preference import DPO

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

CHAT = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "two é"},
    {"role": "user", "content": "three?"},
    {"role": "assistant", "content": "four"},
]
MARKED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}A: {% generation %}{{ message.content }}\n"
    "{% endgeneration %}{% else %}U: {{ message.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
FORGETFUL = "{% for message in messages[-2:] %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bytes")
    save_bytes(path)
    return path


@pytest.fixture
def form(folder: Path) -> ChatForm:
    return ChatForm(FolderTokenizer(str(folder)))


def words(folder: Path) -> Path:
    """A tokenizer that drops white space."""
    names = ["U", "A", ":", "one", "?", "two", "three", "four", "é"]
    plain = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"?!": 0, **{w: i for i, w in enumerate(names, 1)}}, unk_token="?!")
    )
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="?!").save_pretrained(folder)
    return folder


def judged(form: ChatForm, chat: Any = CHAT) -> bytes:
    tokens, kept = form.tokens(chat)
    return bytes(token for token, one in zip(tokens, kept, strict=True) if one)


def test_the_answers_alone_are_judged_to_the_end_of_their_turns(form: ChatForm) -> None:
    assert judged(form) == "two é\nfour\n".encode()
    assert judged(ChatForm(form.tokenizer, MARKED)) == "two é\nfour\n".encode()


def test_a_mask_does_not_run_over_the_turns_that_follow(tmp_path: Path) -> None:
    """As that of transformers does, where the white space at an answer's end is no token."""
    form = ChatForm(FolderTokenizer(str(words(tmp_path))), MARKED)
    tokens, kept = form.tokens(CHAT)
    names = form.tokenizer.of_transformers.convert_ids_to_tokens(tokens)
    assert [name for name, one in zip(names, kept, strict=True) if one] == ["two", "é", "four"]
    theirs = form.tokenizer.of_transformers.apply_chat_template(
        CHAT, chat_template=MARKED, return_assistant_tokens_mask=True, return_dict=True
    )
    assert sum(theirs["assistant_masks"]) > 3, "it takes the question that follows for an answer"


def test_spaces_of_answers_are_judged_also_where_a_tokenizer_leaves_them_out_of_places(tmp_path: Path) -> None:
    """As that of GPT-NeoX does."""
    save_bytes(tmp_path)
    table = json.loads((tmp_path / "tokenizer.json").read_text())
    table["post_processor"] = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False,
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    chat = [{"role": "user", "content": " a  "}, {"role": "assistant", "content": "  if b:\n    c  "}]
    spaced = "{% for message in messages %}{{ message.role }}: {{ message.content }} {% endfor %}"
    ask = "{% if add_generation_prompt %}assistant: {% endif %}"
    form = ChatForm(FolderTokenizer(str(tmp_path)), spaced + ask)
    _, places = form.tokenizer.with_offsets("a  b")
    assert (2, 2) in places, "there are tokens of no length"
    assert judged(form, chat) == b"  if b:\n    c   "


def test_a_sample_predicts_the_answers_alone(form: ChatForm) -> None:
    inputs, targets = ChatSample(form, 100)(CHAT)
    assert bytes(targets[targets >= 0].tolist()) == "two é\nfour\n".encode()
    at = (targets >= 0).nonzero()[:, 0]
    assert torch.equal(inputs[at[:-1] + 1][:-5], targets[at[:-1]][:-5])
    assert (targets < 0).sum() > 0


def test_chats_in_row_groups_come_by_row_group(form: ChatForm) -> None:
    values: Any = type("Values", (list,), {"groups": Groups(np.array([1, 1]), 1)})([CHAT, CHAT])
    assert ChatSet(values, ChatSample(form, 100)).groups is values.groups
    assert ChatSet([CHAT], ChatSample(form, 100)).groups is None


def test_padding_stands_at_the_end_and_weighs_nothing(form: ChatForm) -> None:
    rows = [ChatSample(form, 100)(chat) for chat in (CHAT, CHAT[:2])]
    batch = padded(rows)
    assert (batch[0][1, len(rows[1][0]) :] == -100).all()
    model = GPT(vocabulary=256, context=100, width=8, depth=1, heads=2).eval()
    apart = [NextToken()(model, padded([rows[i]])) for i in (0, 1)]
    assert torch.allclose(NextToken()(model, batch), sum(apart))  # type: ignore[arg-type]
    assert NextToken().counts(batch) == len("two é\nfour\ntwo é\n".encode())


def test_a_chat_without_an_answer_is_refused(form: ChatForm) -> None:
    short = ChatSet([CHAT[:1], CHAT], ChatSample(form, 20))
    with pytest.raises(
        DataError, match=r"no answer of an assistant in its first 20 tokens.*raise the data's 'context'"
    ):
        short[0]
    with pytest.raises(RecipeError, match="the 'context' of chats is 1; it must be at least 2"):
        ChatSample(form, 1)


def test_a_template_that_rewrites_earlier_turns_is_refused(form: ChatForm) -> None:
    with pytest.raises(DataError, match=r"the template writes the turns before answer 2 otherwise once it is there"):
        ChatForm(form.tokenizer, FORGETFUL).tokens(CHAT)
    with pytest.raises(DataError, match=r"the template cannot render the chat \(TemplateSyntaxError"):
        ChatForm(form.tokenizer, "{% for %}").tokens(CHAT)


def test_a_prompt_is_what_the_chat_begins_with(form: ChatForm) -> None:
    prompt = form.encode("one?")
    assert bytes(prompt).decode() == "<|user|>\none?\n<|assistant|>\n"
    assert form.tokens(CHAT)[0][: len(prompt)] == prompt
    assert form.decode(prompt) == bytes(prompt).decode()


def test_the_template_is_the_tokenizer_s_own_or_the_one_given(folder: Path, tmp_path: Path) -> None:
    save_bytes(tmp_path)
    assert ChatForm(FolderTokenizer(str(folder))).used == PLAIN
    (tmp_path / "additional_chat_templates").mkdir()
    for name, text in (("chat_template", MARKED), ("additional_chat_templates/tool_use", PLAIN)):
        (tmp_path / f"{name}.jinja").write_text(text)
        assert ChatForm(FolderTokenizer(str(tmp_path))).used == MARKED, "of several, the default"
    own = ChatForm(FolderTokenizer(str(tmp_path)))
    assert own.used == MARKED
    assert ChatForm(FolderTokenizer(str(tmp_path)), FORGETFUL).used == FORGETFUL
    (tmp_path / "saved").mkdir()
    ChatForm(own.tokenizer, PLAIN).save(tmp_path / "saved")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved", local_files_only=True)
    assert again.apply_chat_template(CHAT, tokenize=False) == ChatForm(own.tokenizer, PLAIN).rendered(CHAT)


def test_the_digest_knows_chats_template_and_context(form: ChatForm) -> None:
    makers = [
        ChatSample(form, 100), ChatSample(form, 99), ChatSample(ChatForm(form.tokenizer, MARKED), 100),
        PreferenceSample(form, 100),
    ]  # fmt: skip
    found = {ChatSet([CHAT], make).digest for make in makers} | {ChatSet([CHAT[:2]], makers[0]).digest}
    assert len(found) == 5
    assert pickle.loads(pickle.dumps(ChatSet([CHAT], makers[0]))).digest in found


# --------------------------------------------------------------------------------------------------------------- files


def lines(path: Path, *chats: Any) -> Path:
    path.write_text("".join((c if isinstance(c, str) else json.dumps({"messages": c})) + "\n" for c in chats))
    return path


def test_files_of_chats_are_read_in_order_and_the_last_are_held_out(folder: Path, tmp_path: Path) -> None:
    def chat(text: str) -> Any:
        return [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]

    lines(tmp_path / "c10.jsonl", chat("c"), "", chat("d"))
    lines(tmp_path / "c2.jsonl", chat("a"), chat("b"))
    data = chat_files(str(tmp_path / "*.jsonl"), str(folder), held_out=0.3)
    assert (len(data.train), len(data.held_out or ())) == (3, 1)
    answers = [bytes(t[t >= 0].tolist()).decode() for _, t in (data.train[i] for i in range(3))]
    assert answers == ["a\n", "b\n", "c\n"]
    assert data.codec is not None
    assert data.codec.bytes_per_token == 1.0


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", r"sample 1 cannot be read: the line of number 1 \(from 0\), at byte .*c.jsonl, is no JSON"),
        ("[]", r"number 1 \(from 0\) in .*c.jsonl \(DataError: a chat is to be \{\"messages\": \[\{\"role\": \"user"),
        ('{"messages": [{"role": "user"}]}', r"number 1 \(from 0\) in .*c.jsonl \(DataError: a chat is to be"),
        ('{"messages": []}', r"number 1 \(from 0\) in .*c.jsonl \(DataError: a chat is to be"),
    ],
)
def test_a_line_that_is_no_chat_is_named(line: str, sentence: str, folder: Path, tmp_path: Path) -> None:
    lines(tmp_path / "c.jsonl", CHAT, line, CHAT, CHAT)
    data = chat_files(str(tmp_path / "c.jsonl"), str(folder))
    assert len(data.train) == 3
    with pytest.raises(DataError, match=sentence):
        data.train[1]


def test_too_few_chats_and_bad_shares_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    lines(tmp_path / "c.jsonl", CHAT)
    with pytest.raises(DataError, match=r"no training sample is left of the 1 in 1 files, the first of them .*c.jsonl"):
        chat_files(str(tmp_path / "c.jsonl"), str(folder))
    with pytest.raises(RecipeError, match="'held_out' is 1.0; it is a share"):
        chat_files(str(tmp_path / "c.jsonl"), str(folder), held_out=1.0)
    with pytest.raises(DataError, match="template.jinja"):
        chat_files(str(lines(tmp_path / "c.jsonl", CHAT, CHAT)), str(folder), template=str(tmp_path / "template.jinja"))


def test_docstrings_are_answers_and_modules_are_held_out_whole(folder: Path) -> None:
    data = docstrings(str(folder), samples=100)
    assert len(data.train) == 100
    assert len(data.held_out or ()) > 100
    inputs, targets = data.train[0]
    text = bytes(inputs.tolist()).decode()
    assert text.startswith("<|user|>\ndef ")
    assert "\n<|assistant|>\n" in text
    assert len(targets[targets >= 0]) > 10


def test_chats_in_files_of_another_format_are_read_alike(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow as arrow
    from pyarrow import parquet as arrow_parquet

    from instep.data.parquet import parquet

    arrow_parquet.write_table(arrow.Table.from_pylist([{"messages": CHAT}] * 3), tmp_path / "c.parquet")
    lines(tmp_path / "c.jsonl", CHAT, CHAT, CHAT)
    found = chats(partial(parquet, str(tmp_path / "c.parquet"), 0.3), str(folder))
    same = chat_files(str(tmp_path / "c.jsonl"), str(folder), held_out=0.3)
    assert torch.equal(found.train[0][1], same.train[0][1])
    assert len(found.train) == len(same.train) == 2


# --------------------------------------------------------------------------------------------------------- preferences


PAIR = {"prompt": "one?", "chosen": "two", "rejected": "no"}
SAME_PAIRS = [
    PAIR,
    {name: [{"role": "user" if name == "prompt" else "assistant", "content": PAIR[name]}] for name in PAIR},
    {
        name: [{"role": "user", "content": "one?"}, {"role": "assistant", "content": PAIR[name]}]
        for name in ("chosen", "rejected")
    },
]


@pytest.mark.parametrize("value", SAME_PAIRS)
def test_a_pair_is_judged_by_its_two_answers_however_it_is_written(form: ChatForm, value: Any) -> None:
    pair = PreferenceSample(form, 100)(value)
    for side, answer in (("chosen", b"two\n"), ("rejected", b"no\n")):
        inputs, targets = pair[side]
        assert bytes(targets[targets >= 0].tolist()) == answer
        assert bytes(inputs.tolist()).startswith(b"<|user|>\none?\n<|assistant|>\n")


def test_answers_that_both_texts_begin_with_are_not_judged(form: ChatForm) -> None:
    pair = PreferenceSample(form, 200)(
        {"prompt": CHAT[:3], "chosen": "four", "rejected": [{"role": "assistant", "content": "five"}]}
    )
    assert [bytes(t[t >= 0].tolist()) for _, t in pair.values()] == [b"four\n", b"five\n"]


def test_pairs_in_files_are_batches_of_dpo(folder: Path, tmp_path: Path) -> None:
    longer = {**PAIR, "chosen": "two, or three"}
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (PAIR, longer, {"prompt": "x"}, PAIR)))
    data = preference_files(str(tmp_path / "p.jsonl"), str(folder))
    batch = paired([data.train[0], data.train[1]])
    reference = GPT(vocabulary=256, context=100, width=8, depth=1, heads=2)
    objective = DPO(reference=reference)
    assert objective.counts(batch) == 2
    sums = objective(reference.eval(), batch)
    assert torch.allclose(sums["objective"], torch.tensor(2 * 0.693147), atol=1e-5)
    with pytest.raises(DataError, match=r"number 2 \(from 0\) in .*p.jsonl \(DataError: a pair is to be"):
        data.train[2]


# ---------------------------------------------------------------------------------------------------------- tokenizers


def test_the_tokenizer_of_bytes_is_that(folder: Path) -> None:
    tokenizer = FolderTokenizer(str(folder))
    text = "def é\n\t x=1 \U0001f600"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocabulary == 256
    assert tokenizer.digest == BYTES


def test_a_tokenizer_s_digest_is_of_what_it_does(tmp_path: Path) -> None:
    words(tmp_path)
    known = digest_of(tmp_path)
    table = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**table, "padding": {"pad_id": 0}}, indent=7))
    assert digest_of(tmp_path) == known
    table["model"]["vocab"]["five"] = 99
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    assert digest_of(tmp_path) != known
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer.json is no file of a tokenizer"):
        digest_of(tmp_path)
    with pytest.raises(DataError, match=r"transformers cannot load the tokenizer in .*; check its files"):
        _ = FolderTokenizer(str(tmp_path)).of_transformers


def test_a_folder_without_a_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no tokenizer.json, so there is no tokenizer to read texts with"):
        FolderTokenizer(str(tmp_path))
    with pytest.raises(DataError, match="no folder was named to take the tokenizer from"):
        FolderTokenizer("")


def test_what_a_tokenizer_puts_after_a_text_is_left_out_of_a_beginning(folder: Path, tmp_path: Path) -> None:
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.add_special_tokens(["<s>", "</s>"])
    plain.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>")
    whole.save_pretrained(tmp_path)
    tokenizer = FolderTokenizer(str(tmp_path))
    assert tokenizer.encode("ab") == [256, 97, 98]
    assert tokenizer.with_offsets("ab")[0] == [97, 98]
    assert tokenizer.digest != BYTES, "it has two tokens more"
