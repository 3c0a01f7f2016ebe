#!/usr/bin/env bash
# Guess: a step of an optimizer reads the gradients and changes weights and state alone, so that what is in `grad`
# afterwards is still the gradient, for a norm that is logged, a second optimizer, or an accumulation that goes on.
# What torch does: so it is with twelve of thirteen optimizers, and with every one that goes parameter by parameter. The
# foreach implementation of SGD with Nesterov momentum, the default on a GPU, adds the momentum to `grad` itself.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$place/venv/bin/python" - <<'PYTHON'
import torch

torch.set_num_threads(1)
CASES = [
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    (torch.optim.Adam, {"weight_decay": 0.1}),
    (torch.optim.AdamW, {"weight_decay": 0.1}),
    (torch.optim.NAdam, {}),
    (torch.optim.RAdam, {}),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (torch.optim.Adagrad, {}),
    (torch.optim.Adadelta, {}),
    (torch.optim.Rprop, {}),
    (torch.optim.ASGD, {"weight_decay": 0.1}),
    (torch.optim.Adamax, {}),
]


def writes(kind: type[torch.optim.Optimizer], **args: object) -> bool:
    """Whether one of three steps changes a gradient."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(5)) for _ in range(2)]
    optimizer, changed = kind(weights, lr=0.1, **args), False
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.randn(5)
        before = [weight.grad.clone() for weight in weights]
        optimizer.step()
        changed |= not all(map(torch.equal, before, [weight.grad for weight in weights]))
    return changed


print("torch", torch.__version__)
assert torch.__version__.startswith("2.13.0")
found = {}
for kind, args in CASES:
    by_parameter, together = writes(kind, foreach=False, **args), writes(kind, foreach=True, **args)
    found[kind.__name__, *args] = together
    print(f"{kind.__name__:8} {args!s:40} writes into the gradient: by parameter {by_parameter}, foreach {together}")
    assert not by_parameter
written = [case for case, does in found.items() if does]
assert written == [("SGD", "momentum", "nesterov")], "other optimizers, or none: no finding as it is written any more"
PYTHON
