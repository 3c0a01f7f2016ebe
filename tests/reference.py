"""Training in lockstep, slow and obvious: one process, every microbatch by itself, the tree by its definition."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from instep.engines.replica import Replica
from instep.randomness import key, seed_all
from instep.recipe import Recipe
from instep.record.digest import digest_of_state
from instep.reduce.tree import tree_sum

BLOCK = 1 << 15
ALIGN = 16


def reference_digests(recipe: Recipe) -> dict[int, str]:
    """The digest after every step of `recipe`, by version."""
    replica = Replica(recipe, "cpu")
    replica.learn_terms(0)
    digests: dict[int, str] = {}
    for step in range(recipe.steps):
        batches = [replica.batch(step, m) for m in range(recipe.microbatches)]
        counts = [replica.objective.counts(batch) for batch in batches if batch is not None]
        totals = {name: sum(count[name] for count in counts) for name in counts[0]}

        start = {name: buffer.clone() for name, buffer in replica.module.named_buffers()}
        leaves: list[Tensor] = []
        left: list[dict[str, Tensor]] = []
        present = [False] * len(replica.parameters)
        for microbatch, batch in enumerate(batches):
            if batch is None:
                leaves.append(flatten([torch.zeros_like(p) for p in replica.parameters], replica.parameters))
                continue
            seed_all(key(recipe.seed, step, microbatch, "compute"))
            sums = replica.objective.sums(replica.module, batch)
            loss = torch.stack([value / max(1, totals[name]) for name, value in sums.items()]).sum()
            gradients = torch.autograd.grad(loss, replica.parameters, allow_unused=True)
            present = [seen or g is not None for seen, g in zip(present, gradients, strict=True)]
            found = zip(gradients, replica.parameters, strict=True)
            leaves.append(flatten([torch.zeros_like(p) if g is None else g for g, p in found], replica.parameters))
            left.append({name: buffer.clone() for name, buffer in replica.module.named_buffers()})
            for name, buffer in replica.module.named_buffers():
                buffer.copy_(start[name])

        total = tree_sum(leaves, torch.add)
        blocks = [torch.linalg.vector_norm(block[None], dim=1) for block in total.split(BLOCK)]
        norm = math.sqrt(math.fsum(float(block) ** 2 for block in blocks))
        if recipe.clip_norm is not None and norm > recipe.clip_norm:
            total = total * (recipe.clip_norm / (norm + 1e-6))
        whole = unflatten(total, replica.parameters)
        replica.update(step, [g if seen else None for g, seen in zip(whole, present, strict=True)])
        for name, buffer in replica.module.named_buffers():
            values = [state[name] for state in left]
            if all(torch.equal(value, start[name]) for value in values):
                continue
            if buffer.is_floating_point():
                zeros = [torch.zeros_like(buffer)] * (len(batches) - len(values))
                filled = iter(values)
                padded = [next(filled) if batch is not None else zeros.pop() for batch in batches]
                buffer.copy_(tree_sum(padded, torch.add) / len(values))
            else:
                buffer.copy_(torch.stack(values).amax(0))
        digests[step + 1] = digest_of_state(replica.module.state_dict())
    return digests


def flatten(tensors: list[Tensor], like: list[Tensor]) -> Tensor:
    """One vector, each tensor in the order that its parameter has in memory."""
    parts: list[Tensor] = []
    for tensor, parameter in zip(tensors, like, strict=True):
        gap = -tensor.numel() % ALIGN
        parts += [tensor.permute(_order(parameter)).reshape(-1), torch.zeros(gap)]
    flat = torch.cat(parts)
    return torch.cat([flat, torch.zeros(-flat.numel() % BLOCK)])


def unflatten(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    tensors: list[Tensor] = []
    offset = 0
    for tensor in like:
        order = _order(tensor)
        part = flat[offset : offset + tensor.numel()].reshape([tensor.shape[d] for d in order])
        tensors.append(part.permute([order.index(d) for d in range(len(order))]))
        offset += tensor.numel() + -tensor.numel() % ALIGN
    return tensors


def _order(tensor: Tensor) -> list[int]:
    """Dimensions from the slowest to the quickest in memory."""
    return sorted(range(tensor.dim()), key=lambda d: -tensor.stride(d))
