"""What a run has trained, for others: a folder that transformers reads, or text that the model writes."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from instep import data
from instep.components import importable
from instep.data import Codec
from instep.data.tokenizer import copy_tokenizer
from instep.errors import ComponentError, DataError, InstepError, RecordError
from instep.models import generate
from instep.models.hf import save
from instep.pretrained.adapters import is_adapted, merged
from instep.pretrained.runs import Trained
from instep.randomness import key, seed_all
from instep.record.files import disk_error

_APART = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Share of the largest logit by which merging may change one, by the type of the weights: some roundings."""


def export_hf(run: str | os.PathLike[str], folder: Path, ema: float | None = None) -> list[str]:
    """Writes what the run in the folder `run` has trained into `folder`, as transformers saves it: configuration,
    weights (those of adapters merged; with `ema` their average of this decay), tokenizer and template of chats. The
    names of the files.

    It is read back first, by ``from_pretrained``, and must give the same logits, to the bit; merged weights those of
    the adapters, but for roundings. Nothing is downloaded. Raises RecordError where they do not, or `folder` is there,
    ComponentError for a run of another kind of model, and ResourceError where the disk refuses.
    """
    trained = Trained.of(run, ema=ema)
    model = _whole(trained)
    if folder.exists():
        raise RecordError(f"{folder} is there already; choose another folder with --out.")
    try:
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            save(model, aside)
            _save_tokenizer(trained, model, aside)
            aside.chmod(0o777 & ~_umask())
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise disk_error(f"the model cannot be written to {folder}", error) from error
    return sorted(path.name for path in folder.iterdir())


def sampled(
    run: str | os.PathLike[str],
    prompt: str,
    *,
    tokens: int = 200,
    temperature: float = 0.8,
    seed: int = 0,
    ema: float | None = None,
) -> str:
    """The prompt, as the data's codec writes it, and at most so many `tokens` that the run's model goes on with.

    temperature: 0 takes the likeliest token each time. seed: of the drawing. ema: the decay of the average of the
    weights that is to write, if one is. It stops where the tokenizer's own end comes. Raises DataError where the run's
    data are no text, and RecordError for numbers out of range.
    """
    if tokens < 1 or not 0 <= temperature < math.inf or seed < 0:
        raise RecordError(
            f"a sample of {tokens} tokens at temperature {temperature:g} with seed {seed} cannot be drawn; give at "
            f"least 1 token, a temperature from 0 and a seed from 0."
        )
    trained = Trained.of(run, ema=ema)
    codec = _codec(trained)
    if codec is None:
        raise DataError(
            f"the data of {trained.folder.path} have no codec between text and tokens, so its model cannot be "
            f"prompted; give one in the recipe's instep.Data, as instep.data.text does."
        )
    torch.set_num_threads(trained.recipe.threads)
    given = codec.encode(prompt) or codec.encode("\n")
    drawn = generate(
        trained.model, torch.tensor([given]), tokens, torch.Generator().manual_seed(seed), temperature
    )[0].tolist()  # fmt: skip
    end = getattr(codec, "end", None)
    if end in drawn[len(given) :]:
        drawn = drawn[: drawn.index(end, len(given))]
    return codec.decode(drawn)


def _whole(trained: Trained) -> nn.Module:
    """The trained model as one of transformers, in eval mode."""
    model = trained.model.eval()
    if is_adapted(model):
        before = _logits(model)
        whole = merged(model).eval()
        apart, scale = float((_logits(whole) - before).abs().max()), float(before.abs().max())
        most = _APART.get(next(whole.parameters()).dtype, 0.1) * scale
        if not apart <= most:
            raise RecordError(
                f"the merged weights of {trained.folder.path} give other logits than its adapters, by up to "
                f"{apart:.2g} where {most:.2g} would be roundings; load the base in float32 (recipe.model.args.dtype)."
            )
        return whole
    if not hasattr(model, "save_pretrained") or not hasattr(model, "generation_config"):
        raise ComponentError(
            f"the model of {trained.folder.path} is a {type(model).__name__}, and only causal models of transformers "
            f"are exported to hf; its weights are in {trained.folder.checkpoints}, in safetensors."
        )
    return model


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(16)[None] % model.config.vocab_size).logits.float()
    return found


def _save_tokenizer(trained: Trained, model: Any, folder: Path) -> None:
    """That of the data, with the template they use; where the data are gone or have none, that of the base."""
    try:
        codec: Any = _codec(trained)
    except InstepError:
        codec = None
    if callable(getattr(codec, "save", None)):
        codec.save(folder)
        return
    base = Path(getattr(model.config, "_name_or_path", "") or "/dev/null")
    if base.is_dir():
        copy_tokenizer(base, folder)


def _codec(trained: Trained) -> Codec | None:
    """Of the run's data, which are built for it."""
    seed_all(key(trained.recipe.seed, "data"))
    with importable(trained.import_paths):
        return data.from_component(trained.recipe.data).codec


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
