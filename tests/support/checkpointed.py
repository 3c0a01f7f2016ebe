"""Models whose blocks are recomputed, and their gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instep import gradient_checkpointing as gc
from instep.gradient_checkpointing.structure import BlockKind, Plan, Profile
from instep.models import GPT


def next_token(model: nn.Module, tokens: Tensor) -> Tensor:
    out: Any = model(tokens)
    logits = getattr(out, "logits", out)
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), reduction="sum")


def classes(model: nn.Module, images: Tensor) -> Tensor:
    return F.cross_entropy(model(images), torch.arange(len(images)) % 10, reduction="sum")


class Residual(nn.Module):
    """BatchNorm, and additions and ReLU in place."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.second(self.relu(self.norm(self.first(x)))))
        y += x
        out: Tensor = self.relu(y)
        return out


class ResNet(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.Sequential(*[Residual(8) for _ in range(depth)])
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return out


def gpt(**changes: Any) -> tuple[nn.Module, Any, Tensor]:
    fields = {"vocabulary": 32, "context": 32, "width": 32, "depth": 3, "heads": 2, **changes}
    torch.manual_seed(0)
    return GPT(**fields), next_token, torch.randint(0, 32, (4, 32))


def resnet() -> tuple[nn.Module, Any, Tensor]:
    torch.manual_seed(0)
    return ResNet(), classes, torch.randn(6, 1, 8, 8)


def hugging_face(name: str) -> tuple[nn.Module, Any, Tensor]:
    """A model of `transformers` from a config. Raises ImportError where that is not installed."""
    import transformers as hf

    torch.manual_seed(0)
    common = {"vocab_size": 32, "use_cache": False, "bos_token_id": None, "eos_token_id": None}
    model: Any
    if name == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(n_positions=32, n_embd=32, n_layer=3, n_head=2, **common))
    else:
        model = hf.LlamaForCausalLM(
            hf.LlamaConfig(
                hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, **common,
            )
        )  # fmt: skip
    return model.train(), next_token, torch.randint(0, 32, (4, 32))


CASES = {
    "gpt": gpt,
    "gpt with dropout": lambda: gpt(dropout=0.2),
    "gpt untied": lambda: gpt(tied=False),
    "resnet": resnet,
}


def after_step(model: nn.Module, objective: Any, batch: Any) -> list[Tensor]:
    """Gradients and then buffers after a forward and backward from fixed random numbers; the buffers are put back."""
    before = [buffer.clone() for buffer in model.buffers()]
    torch.manual_seed(3)
    found = torch.autograd.grad(objective(model, batch), list(model.parameters()), allow_unused=True)
    state = torch.get_rng_state()
    left = [buffer.clone() for buffer in model.buffers()]
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.data.copy_(value)
    return [*(gradient for gradient in found if gradient is not None), *left, state]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _steady(kind: BlockKind) -> BlockKind:
    """An operation takes as long as its FLOPs and its number in the block say."""
    numbered = enumerate(kind.operations)
    return replace(kind, operations=tuple(replace(op, seconds=op.flops + 1e-3 * number) for number, op in numbered))


def ten_plans(profile: Profile) -> Iterator[Plan]:
    """Plans at ten budgets, from everything kept to nothing kept, with seconds that are the same every time."""
    profile = replace(profile, kinds=tuple(map(_steady, profile.kinds)))
    least = gc.least_bytes(profile)
    for share in range(10):
        budget = profile.peak_bytes - (profile.peak_bytes - least) * share // 9
        yield gc.plan(profile, budget_bytes=budget)
