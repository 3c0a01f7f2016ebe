"""Folders of small models of transformers, with the tokenizer of bytes and a few chats, and recipes on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from instep.cli.flags import merge
from instep.data.tokenizer import save_bytes
from instep.models.hf import causal, save
from instep.models.start import seeded
from instep.recipe import Recipe, parse
from instep.recipe_files import read

SMALL = {
    "llama": {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 256, "tie_word_embeddings": True,
    },
    "opt": {
        "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 16,
        "max_position_embeddings": 256, "pad_token_id": 1,
    },
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256, "bos_token_id": 0, "eos_token_id": 0},
}  # fmt: skip


def base_folder(path: Path, family: str = "llama", words: int = 256, dtype: str = "float32", **config: Any) -> Path:
    """A folder with a model of random weights, the same each time."""
    model: Any = seeded(lambda: causal(family, vocab_size=words, **{**SMALL[family], **config})).eval()
    for parameter in model.parameters():  # not `to`, which would round what positions are computed from
        parameter.data = parameter.data.to(getattr(torch, dtype))
    save(model, path)
    save_bytes(path)
    chats = ([("user", f"what is {n}?"), ("assistant", f"{n} is {n * n}" + "!" * (n % 7))] for n in range(48))
    (path / "chats.jsonl").write_text(
        "".join(json.dumps({"messages": [{"role": r, "content": c} for r, c in chat]}) + "\n" for chat in chats)
    )
    return path


def recipe_on(name: str, folder: Path, **settings: str) -> Recipe:
    """A built-in recipe on the model in `folder`, short and without artifacts; ``data__args__context`` sets a field."""
    short = {"steps": "6", "evaluate_every": "0", "evaluate_samples": "4", "sample_length": "0"}
    given = {"model__args__folder": str(folder), **short, **settings}
    if name in ("lora", "sft"):
        chats = f'{{ pattern = "{folder}/chats.jsonl", tokenizer = "{folder}", context = 64 }}'
        given = {"data__use": "instep.data.chats:chat_files", "data__args": chats, **given}
    table = read(name)
    table.pop("artifacts", None)
    return parse(merge(table, [(f"recipe.{key.replace('__', '.')}", value) for key, value in given.items()]))[0]
