#!/usr/bin/env bash
# Guess: torch.optim.Optimizer.load_state_dict casts tensors in the state and keeps everything else as it is.
# What torch does: it rebuilds every iterable from a generator of its parts, text too, which so becomes the generator's
# description. An optimizer that keeps a word in its state finds another one after a resume, without an error.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$place/venv/bin/python" - <<'PYTHON'
import torch

def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)

saved = optimizer()
(weight,) = saved.param_groups[0]["params"]
saved.state[weight] = {"phase": "slow", "count": 3}
loaded = optimizer()
loaded.load_state_dict(saved.state_dict())
(state,) = loaded.state.values()
print("torch", torch.__version__)
print("saved: phase =", repr(saved.state[weight]["phase"]), " loaded: phase =", repr(state["phase"]))
assert torch.__version__.startswith("2.13.0")
assert state["count"] == 3
assert state["phase"].startswith("<generator object"), "text comes back as it was: this is no finding any more"
PYTHON
