"""Language models of the `transformers` library, from a configuration, and as they are saved: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from instep.errors import ComponentError, RecordError, shown
from instep.hf_library import no_extra, quiet_transformers


def causal(family: str = "llama", **config: Any) -> nn.Module:
    """A causal language model of `family` ("llama", "gpt2", "qwen2", ...) with random weights. Needs the extra ``hf``.

    config: as for the family's configuration class, such as ``vocab_size``, ``hidden_size``, ``num_hidden_layers``. The
    model maps tokens [B, T] to an object with ``.logits``, [B, T, V]. It keeps no cache while it is trained.
    Raises ComponentError where `transformers` is not installed, or refuses the family or the configuration.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise no_extra() from None
    try:
        settings = AutoConfig.for_model(family, **{"use_cache": False, **config})
        model: nn.Module = AutoModelForCausalLM.from_config(settings)
    except Exception as error:  # its own classes of errors differ from version to version
        cause = error.__cause__ or error
        text = (str(cause).strip().splitlines() or [type(cause).__name__])[0].rstrip(".")
        raise ComponentError(
            f"transformers cannot build a causal model {shown(family)} of {config}: {text[:200]}; check 'model.args'."
        ) from error
    return model


def save(model: Any, folder: Path) -> None:
    """Saves a model of transformers, in eval mode, where ``AutoModelForCausalLM.from_pretrained`` finds all but its
    tokenizer.

    It is read back, offline, and must give the same logits, to the bit. Raises RecordError where it does not.
    """
    from transformers import AutoModelForCausalLM

    model.config.use_cache = True  # for who generates with it
    generation = model.generation_config
    if any(getattr(generation, name, None) is not None for name in ("temperature", "top_p", "top_k")):
        generation.do_sample = True  # which the library refuses to save otherwise, though models come without
    with quiet_transformers():
        model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    tokens = torch.arange(16)[None] % model.config.vocab_size
    device = next(model.parameters()).device
    if not torch.equal(again(tokens).logits, model(tokens.to(device)).logits.cpu()):
        raise RecordError(f"the model read back from {folder} gives other logits than the one that was saved.")
