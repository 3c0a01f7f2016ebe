"""Low-rank adapters (LoRA, Hu et al., 2021, arXiv:2106.09685) on a model of transformers, by peft.

The adapters alone are trained, and alone in a state_dict, and so in checkpoints and what goes between processes. What
they stand on is loaded from its folder each time, and known by its digest: a state_dict has it as `BASE_DIGEST`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from instep.errors import CheckpointError, ComponentError, cut, described, shown
from instep.hf_library import quiet_transformers
from instep.pretrained.local import hf
from instep.record.digest import digest_of_state

BASE_DIGEST = "base_digest"
"""The name in a state_dict of the 32 bytes of the base's digest."""

ALL_LINEAR = "all-linear"
"""As `targets`: every linear layer but the head."""


def lora(
    folder: str | os.PathLike[str] = "",
    *,
    rank: int = 8,
    alpha: float = 16.0,
    targets: str | Sequence[str] = ALL_LINEAR,
    dropout: float = 0.0,
    dtype: str = "float32",
    attention: str | None = None,
) -> nn.Module:
    """The causal model in `folder`, see `instep.pretrained.hf`, frozen, with adapters that are trained. Needs the extra
    ``lora``.

    rank, alpha: each target's weight W, [out, in], becomes W + alpha / rank B A, with A [rank, in] and B [out, rank],
        which starts at 0. Adapters are float32, whatever the `dtype` of the base.
    targets: names of modules, or the ends of such, as ["q_proj", "v_proj"], or "all-linear".
    dropout: of what goes into the adapters.

    Raises ComponentError as `hf`, for a target that matches nothing or cannot have an adapter, or is tied to another
    weight: merged, that would get the adapter twice.
    """
    if rank < 1 or not 0 <= dropout < 1:
        which, value, rule = ("dropout", dropout, "from 0 to below 1") if rank >= 1 else ("rank", rank, "at least 1")
        raise ComponentError(f"'{which}' of the adapters is {value}; it must be {rule}.")
    base = hf(folder, dtype=dtype, attention=attention)
    peft = _peft()
    wanted = targets if isinstance(targets, str) else list(targets)
    _check_targets(base, [wanted] if isinstance(wanted, str) else wanted)
    if isinstance(wanted, str) and wanted != ALL_LINEAR:
        wanted = [wanted]
    shared = _shared(base)
    digest = digest_of_state(base.state_dict())
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules=wanted, lora_dropout=dropout
    )
    try:
        with quiet_transformers():
            model: nn.Module = peft.get_peft_model(base, config)
    except Exception as error:
        raise ComponentError(
            f"peft cannot put adapters on the targets {shown(targets)} of {cut(os.fspath(folder))} "
            f"({described(error)}); choose others, such as '{ALL_LINEAR}'."
        ) from error
    for name, layer in model.named_modules():
        if hasattr(layer, "base_layer") and id(layer.base_layer.weight) in shared:
            raise ComponentError(
                f"the target '{name}' is tied to '{shared[id(layer.base_layer.weight)]}', so that its adapter would be "
                f"merged into both; leave it out of 'targets'."
            )
    _only_adapters(model, digest, os.fspath(folder))
    return model


def merged(model: nn.Module) -> nn.Module:
    """The model of transformers that `model` is with its adapters merged into the weights, in the base's types.

    It is `model` itself that is changed. The sums are made in float32, and rounded to the base's type once: merged
    weights are not quite what was trained, by a rounding.
    """
    base: Any = model.base_model
    types = {name.replace(".base_layer.", "."): p.dtype for name, p in base.model.named_parameters()}
    for parameter in model.parameters():  # not `to`, which would round what the positions are computed from
        parameter.data = parameter.data.float()
    whole: Any = model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    for name, parameter in whole.named_parameters():
        parameter.data = parameter.data.to(types[name])
    made: nn.Module = whole.requires_grad_(True)
    return made


def is_adapted(model: nn.Module) -> bool:
    """Whether it has adapters of peft."""
    return hasattr(model, "peft_config") and hasattr(model, "merge_and_unload")


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ComponentError(
            "adapters come with peft, which is not installed; install it with: pip install 'instep[lora]'."
        ) from None
    return peft


def _check_targets(base: nn.Module, targets: Sequence[str]) -> None:
    """Raises ComponentError for one that matches no module."""
    names = [name for name, _ in base.named_modules()]
    ends = sorted({name.rpartition(".")[2] for name, part in base.named_modules() if isinstance(part, nn.Linear)})
    for target in targets:
        if target != ALL_LINEAR and not any(name == target or name.endswith(f".{target}") for name in names):
            raise ComponentError(
                f"the target {shown(target)} matches no module of the model, so nothing would be trained there; its "
                f"linear layers are {', '.join(ends) or 'none'} (recipe.model.args.targets)."
            )
    if not targets:
        raise ComponentError(f"'targets' of the adapters is empty; name modules, or '{ALL_LINEAR}'.")


def _shared(base: nn.Module) -> dict[int, str]:
    """Weights that have several names: by identity, the last of these."""
    seen, found = set[int](), dict[int, str]()
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            found[id(parameter)] = name
        seen.add(id(parameter))
    return found


def _only_adapters(model: nn.Module, digest: str, folder: str) -> None:
    """Leaves the base out of the model's state_dict, and has what is loaded be of the base that is there."""
    names = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    # Partial functions: torch sets attributes on hooks, which methods do not take.
    model.register_state_dict_post_hook(partial(_leave_base_out, names, digest))
    model.register_load_state_dict_pre_hook(partial(_check_base, digest, folder))
    model.register_load_state_dict_post_hook(partial(_miss_no_base, names))


def _leave_base_out(
    names: frozenset[str], digest: str, module: nn.Module, state: dict[str, Any], prefix: str, _: Any
) -> None:
    for name in [each for each in state if each.startswith(prefix) and each[len(prefix) :] not in names]:
        del state[name]
    state[f"{prefix}{BASE_DIGEST}"] = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)


def _check_base(digest: str, folder: str, module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Raises CheckpointError where `state` is of adapters on another base."""
    saved = state.pop(f"{prefix}{BASE_DIGEST}", None)
    known = digest if saved is None else bytes(saved.cpu().tolist()).hex()
    if known != digest:
        raise CheckpointError(
            f"the adapters were trained on other weights than {cut(folder)} holds now on {socket.gethostname()}: those "
            f"had the digest {known}, these have {digest}; put the folder back as it was, or start a new run."
        )


def _miss_no_base(names: frozenset[str], module: nn.Module, incompatible: Any) -> None:
    missing = incompatible.missing_keys
    missing[:] = [name for name in missing if any(name.endswith(own) for own in names)]
