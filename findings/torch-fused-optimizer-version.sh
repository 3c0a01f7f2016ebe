#!/usr/bin/env bash
# Guess: weights that an optimizer changes between a forward and its backward are found by autograd, which raises
# "modified by an inplace operation", whichever of its implementations makes the step.
# What torch does: the fused ones, which promise the same step in less time, leave the version counters of what they
# change as they were. Backward then runs without an error, and with the weights of after the step: what it gives is
# the gradient of no forward. A pipeline, a delayed update or a second model that shares weights gets no warning.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$place/venv/bin/python" - <<'PYTHON'
import torch

torch.set_num_threads(1)


def what_backward_says(optimizer: type[torch.optim.Optimizer], **how: bool) -> tuple[int, str]:
    """How far two steps bring the weight's version counter, and what a backward over the second one comes to."""
    weight = torch.nn.Parameter(torch.ones(3))
    steps = optimizer([weight], lr=0.25, **how)
    weight.grad = torch.ones(3)
    steps.step()
    data = torch.ones(3, requires_grad=True)
    seen = weight.detach().clone()
    product = (weight * data).sum()  # keeps the weight for backward
    steps.step()
    assert not torch.equal(weight.detach(), seen), "the step has changed the weight"
    try:
        product.backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return weight._version, "raises"
    right = torch.equal(data.grad, seen)
    return weight._version, "the gradient of the forward" if right else "a gradient of other weights"


print("torch", torch.__version__)
assert torch.__version__.startswith("2.13.0")
for optimizer in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad):
    for how in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        version, said = what_backward_says(optimizer, **how)
        print(f"{optimizer.__name__:8} {how!s:18} version counter {version}, backward: {said}")
        if "fused" in how:
            assert (version, said) == (0, "a gradient of other weights"), "fused steps are seen: no finding any more"
        else:
            assert version > 0 and said == "raises"
PYTHON
