"""Language models of the `transformers` library, from a configuration alone: nothing is downloaded."""

from __future__ import annotations

from typing import Any

from torch import nn

from instep.errors import ComponentError, shown


def causal(family: str = "llama", **config: Any) -> nn.Module:
    """A causal language model of `family` ("llama", "gpt2", "qwen2", ...) with random weights. Needs the extra ``hf``.

    config: as for the family's configuration class, such as ``vocab_size``, ``hidden_size``, ``num_hidden_layers``. The
    model maps tokens [B, T] to an object with ``.logits``, [B, T, V]. It keeps no cache while it is trained.
    Raises ComponentError where `transformers` is not installed, or refuses the family or the configuration.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise ComponentError(
            "this model comes with transformers, which is not installed; install it with: pip install 'instep[hf]'."
        ) from None
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
