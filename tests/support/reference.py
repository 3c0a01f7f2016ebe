"""Training in lockstep, slow and obvious: one process, every microbatch by itself, the tree by its definition."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from instep.randomness import key, seed_all
from instep.recipe import Recipe
from instep.record.digest import digest_of_state
from instep.reduce.tree import tree_sum
from instep.worker.replica import Replica

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
        weights = {name: parameter.detach().clone() for name, parameter in replica.module.named_parameters()}
        written: dict[str, dict[int, float]] = {name: {} for name in weights}
        leaves: list[Tensor] = []
        left: list[dict[str, Tensor] | None] = []
        present = [False] * len(replica.parameters)
        finite = True
        for microbatch, batch in enumerate(batches):
            if batch is None:
                leaves.append(flatten([torch.zeros_like(p) for p in replica.parameters], replica.parameters))
                left.append(None)
                continue
            seed_all(key(recipe.seed, step, microbatch, "compute"))
            sums = replica.objective.sums(replica.module, batch)
            loss = torch.stack([value / max(1, totals[name]) for name, value in sums.items()]).sum()
            gradients = torch.autograd.grad(loss, replica.parameters, allow_unused=True)
            present = [seen or g is not None for seen, g in zip(present, gradients, strict=True)]
            found = zip(gradients, replica.parameters, strict=True)
            leaves.append(flatten([torch.zeros_like(p) if g is None else g for g, p in found], replica.parameters))
            finite = finite and all(bool(torch.isfinite(value)) for value in sums.values())
            left.append({name: buffer.clone() for name, buffer in replica.module.named_buffers()})
            for name, buffer in replica.module.named_buffers():
                buffer.copy_(start[name])
            for name, parameter in replica.module.named_parameters():
                values = zip(parameter.flatten().tolist(), weights[name].flatten().tolist(), strict=True)
                for place, (value, before) in enumerate(values):
                    if value != before:
                        assert written[name].setdefault(place, value) == value, f"the microbatches disagree on {name}"
                parameter.data.copy_(weights[name])

        for name, parameter in replica.module.named_parameters():
            for place, value in written[name].items():
                parameter.data[torch.unravel_index(torch.tensor(place), parameter.shape)] = value

        total = tree_sum(leaves, torch.add)
        blocks = [torch.linalg.vector_norm(block[None], dim=1) for block in total.split(BLOCK)]
        norm = math.sqrt(math.fsum(float(block) ** 2 for block in blocks))
        if recipe.watch.bad_batch == "skip" and not (finite and math.isfinite(norm) and any(totals.values())):
            digests[step + 1] = digest_of_state(replica.module.state_dict())
            continue
        if recipe.clip_norm is not None and norm > recipe.clip_norm:
            total = total * (recipe.clip_norm / (norm + 1e-6))
        whole = unflatten(total, replica.parameters)
        replica.update(step, [g if seen else None for g, seen in zip(whole, present, strict=True)])
        for name, buffer in replica.module.named_buffers():
            found_by = [None if state is None else state[name] for state in left]
            if any(value is not None and not torch.equal(value, start[name]) for value in found_by):
                buffer.copy_(next_buffer(mode_of(recipe, name, buffer), start[name], found_by))
        digests[step + 1] = digest_of_state(replica.module.state_dict())
    return digests


def mode_of(recipe: Recipe, name: str, buffer: Tensor) -> str:
    """The first pattern that matches decides."""
    matching = [mode for pattern, mode in recipe.buffers.items() if fnmatch.fnmatchcase(name, pattern)]
    return matching[0] if matching else "mean" if buffer.is_floating_point() else "max"


def next_buffer(mode: str, start: Tensor, left: Sequence[Tensor | None]) -> Tensor:
    """What a buffer is after a step that began with `start`, from what the microbatches left."""
    present = [value for value in left if value is not None]
    if mode == "frozen":
        return start
    if mode == "last":
        return present[-1]
    if mode == "max":
        return torch.stack(present).amax(0)
    wide = start.dtype if start.dtype in (torch.float64, torch.int64) else torch.float32
    none = torch.zeros(start.shape, dtype=wide)
    if mode == "mean":
        return tree_sum([none if value is None else value.to(wide) for value in left], torch.add) / len(present)
    decay = float(mode.partition(":")[2] or 1)
    before = start.to(wide) * (decay if start.is_floating_point() else int(decay))
    return before + tree_sum([none if value is None else value.to(wide) - before for value in left], torch.add)


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
