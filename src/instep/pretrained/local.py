"""Causal models of the `transformers` library from a folder of this machine: nothing is downloaded, ever."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from instep.data.tokenizer import digest_of
from instep.errors import CheckpointError, ComponentError, cut, shown
from instep.hf_library import no_extra, quiet_transformers
from instep.record.weights import read_header
from instep.sources import note_loaded
from instep.tables import suggest

DTYPES = ("float32", "bfloat16", "float16")

_CONFIG, _ONE, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def hf(folder: str | os.PathLike[str] = "", *, dtype: str = "float32", attention: str | None = None) -> nn.Module:
    """The causal model in `folder`, as `save_pretrained` leaves it: its configuration and weights in safetensors, whole
    or in shards. Needs the extra ``hf``.

    dtype: that the weights have, whatever that of the files is: "float32", "bfloat16" or "float16". With
    ``precision = "bfloat16"`` in the recipe they stay float32, and only the computing is narrow.
    attention: transformers' ``attn_implementation``, such as "eager"; by default its own choice, whatever the folder's
    configuration says, since that may name code to download.

    The model maps tokens [B, T] to an object with ``.logits``, [B, T, V], and keeps no cache. Raises ComponentError
    where the folder, a file or the library is missing, or where weights and configuration are not of one model.
    """
    if dtype not in DTYPES:
        raise ComponentError(f"'dtype' is {shown(dtype)}{suggest(dtype, DTYPES, 'weights are loaded as')}")
    if attention is not None and "/" in attention:
        raise ComponentError(
            f"'attention' is {shown(attention)}, code that would be downloaded; give one that is here, such as 'sdpa'."
        )
    place = checked_folder(folder)
    weights = weight_files(place)
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise no_extra() from None
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)
            _check_plain(place, config)
            config._attn_implementation, config._experts_implementation = attention, None  # of its parts, too
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                place, config=config, dtype=getattr(torch, dtype), local_files_only=True, use_safetensors=True,
                trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
    except ComponentError:
        raise
    except Exception as error:  # its own classes of errors differ from version to version
        text = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ComponentError(
            f"transformers cannot load a causal model from {place} ({cut(text)}); check its {_CONFIG} and weights."
        ) from error
    model, found = loaded
    _check_all_there(place, weights, config, found)
    _note(folder, [place / _CONFIG, *weights])
    model.config.use_cache = False
    model.tokenizer_digest = digest_of(place)
    made: nn.Module = model
    return made


def _note(folder: str | os.PathLike[str], files: Iterable[Path]) -> None:
    """Has other hosts compare them: each, and which there are."""
    files = sorted(files)
    for file in files:
        note_loaded(f"file {os.fspath(folder).rstrip('/')}/{file.name}", file)
    note_loaded(f"model in {os.fspath(folder)}", " ".join(file.name for file in files))


def checked_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder of a model. Raises ComponentError where it is none."""
    if not os.fspath(folder):
        raise ComponentError(
            "no folder was named to load a model of transformers from; give one, such as that which recipe hf leaves, "
            "as in: instep train hf --out runs/hf, then --recipe.model.args.folder runs/hf/artifacts/hf."
        )
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise ComponentError(
            f"there is no folder {cut(place)} (from {os.getcwd()}) to load a model of transformers from; download the "
            f"model first, and give the folder that holds its {_CONFIG}."
        )
    if not (place / _CONFIG).is_file():
        left = place / "artifacts" / "hf"
        why = f"it is a run, whose model is in {left}" if (left / _CONFIG).is_file() else "give the folder that has it"
        raise ComponentError(f"{cut(place)} has no {_CONFIG}, so no model of transformers is there; {why}.")
    return place


def weight_files(place: Path) -> list[Path]:
    """The files of the weights, each seen to be whole. Raises ComponentError."""
    if (place / _INDEX).is_file() and not (place / _ONE).is_file():
        try:
            names = sorted(set(json.loads((place / _INDEX).read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ComponentError(f"{place / _INDEX} is no index of shards; load the folder again.") from None
        files = [place / str(name) for name in names]
    elif (place / _ONE).is_file():
        files = [place / _ONE]
    elif (place / "adapter_config.json").is_file():
        raise ComponentError(
            f"{cut(place)} holds an adapter and not the weights of its model; merge them, or give the model's folder."
        )
    else:
        other = next(iter(sorted(path.name for path in place.glob("pytorch_model*.bin"))), "")
        instead = f"it has {other}, a pickle, which could run code: save it anew in safetensors" if other else ""
        raise ComponentError(f"{cut(place)} has no {_ONE}; {instead or 'give the folder that holds the weights'}.")
    if (place / "adapter_config.json").is_file():
        raise ComponentError(
            f"{cut(place)} holds an adapter beside its weights, and transformers would put it on them; merge it, or "
            f"move its adapter_config.json away."
        )
    for file in files:
        try:
            with open(file, "rb") as opened:
                read_header(opened, file)
        except OSError as error:
            raise ComponentError(
                f"the weights {file} cannot be read: {error.strerror or error}; load the model's folder again, whole."
            ) from None
        except CheckpointError as error:
            raise ComponentError(error.message) from None
    return files


def _check_plain(place: Path, config: Any) -> None:
    """Raises ComponentError for weights that are no plain numbers."""
    if getattr(config, "quantization_config", None):
        raise ComponentError(
            f"the weights in {place} are quantised, which cannot be trained bit for bit; give the model's folder with "
            f"plain weights."
        )


def _check_all_there(place: Path, files: list[Path], config: Any, found: dict[str, Any]) -> None:
    """Raises ComponentError where the files hold other weights than the configuration's model has.

    transformers would draw those that are missing at random, and leave the others out, with a warning.
    """
    missing, spare = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    other = sorted((name, list(there), list(here)) for name, there, here in found["mismatched_keys"])
    if not (missing or spare or other):
        return
    kind = (getattr(config, "architectures", None) or [config.model_type])[0]
    if other:
        name, there, here = other[0]
        why = f"'{name}' has the shape {there} there, and {here} in the model"
    elif missing:
        why = f"'{missing[0]}'{_more(missing)} is missing"
    else:
        why = f"'{spare[0]}'{_more(spare)} is of no such model"
    where = files[0] if len(files) == 1 else f"{place} ({len(files)} shards)"
    raise ComponentError(
        f"the weights in {where} are not those of the {kind} that {place / _CONFIG} describes: {why}; give a folder "
        f"whose weights and {_CONFIG} belong together."
    )


def _more(names: Iterable[str]) -> str:
    count = len(list(names)) - 1
    return f" (and {count} others)" if count else ""
