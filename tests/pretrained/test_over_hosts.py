"""Hosts whose folders of a pretrained model differ are named before anything is trained."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from instep import Team
from instep.errors import WorkerError
from support import agents
from support.agents import meet_here, train_on

pytest.importorskip("peft")
pytest.importorskip("transformers")

from support.base_models import base_folder, recipe_on

pytestmark = pytest.mark.processes


def with_another_bit(folder: Path) -> None:
    """Of the last weight."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)


def with_other_settings(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))


CASES: dict[tuple[str, str], tuple[Callable[[Path], None], str]] = {
    ("lora", "synchronous"): (with_another_bit, "file ~/llama/model.safetensors"),
    ("lora", "asynchronous"): (with_another_bit, "file ~/llama/model.safetensors"),
    ("sft", "synchronous"): (with_other_settings, "file ~/llama/config.json"),
    ("sft", "diloco:2"): (with_another_bit, "file ~/llama/model.safetensors"),
    ("dpo", "synchronous"): (with_another_bit, "file ~/llama/model.safetensors"),
}


QUICK = [("lora", "asynchronous"), ("sft", "synchronous")]
PAIRS = [pytest.param(*each, marks=[] if each in QUICK else pytest.mark.slow) for each in CASES]
REFERENCE = {"use": "instep.pretrained:hf", "args": '{ folder = "~/llama" }'}


@pytest.mark.parametrize(("name", "rule"), PAIRS)
def test_a_host_with_another_base_is_refused_by_name_and_file(
    name: str, rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, file = CASES[name, rule]
    base = base_folder(tmp_path / "first" / "llama")
    spoil(Path(shutil.copytree(base, tmp_path / "second" / "llama")))
    monkeypatch.setenv("HOME", str(tmp_path / "first"))
    follow = agents._follow

    def at_home(*given: Any) -> None:
        os.environ["HOME"] = str(tmp_path / "second")
        follow(*given)

    monkeypatch.setattr(agents, "_follow", at_home)
    meet_here(monkeypatch, tmp_path)
    given = {"model__args__folder": "~/llama"}
    if name == "dpo":  # what differs is the reference alone
        given = {f"objective__args__reference__{key}": value for key, value in REFERENCE.items()}
        given |= {"model__use": "instep.pretrained:lora", "model__args": f'{{ folder = "{base}" }}'}
        given |= {"data__args__samples": "64", "data__args__held_out": "8"}
    else:
        given["data__args"] = f'{{ pattern = "{base}/chats.jsonl", tokenizer = "{base}", context = 64 }}'
    recipe = recipe_on(name, base, rule=rule, **given)
    sentence = (
        rf"^worker 1 on host 1 \(.*\) has another {file} than (worker 0|the server), and the result would be that"
    )
    with pytest.raises(WorkerError, match=sentence) as raised:
        train_on((1, 1), recipe, Team(workers=2), tmp_path / "run")
    assert raised.value.message.endswith("of neither; give all hosts the same files.")
