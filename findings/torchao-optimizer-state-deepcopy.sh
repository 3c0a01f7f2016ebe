#!/usr/bin/env bash
# Guess: the state_dict of an optimizer can be kept aside with copy.deepcopy, as that of every optimizer of torch can.
# What torchao's 8-bit AdamW does: its moments are tensors of a class that implements no clone, so deepcopy raises,
# though torch.save and torch.load take the same state there and back.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 torchao==0.18.0 numpy==2.4.6
"$place/venv/bin/python" -W ignore - <<'PYTHON' 2>"$place/err" || { cat "$place/err"; exit 1; }
import copy
import importlib.metadata
import io

import torch
from torchao.optim import AdamW8bit

weight = torch.nn.Parameter(torch.zeros(4096))  # smaller ones keep plain moments
optimizer = AdamW8bit([weight], lr=0.1)
weight.grad = torch.ones_like(weight)
optimizer.step()
state = optimizer.state_dict()
print("torch", torch.__version__, "torchao", importlib.metadata.version("torchao"))
print("the first moment is a", type(state["state"][0]["exp_avg"]).__name__)
file = io.BytesIO()
torch.save(state, file)
file.seek(0)
torch.load(file, weights_only=False)
print("torch.save and torch.load: there and back")
try:
    copy.deepcopy(state)
except NotImplementedError as error:
    print("copy.deepcopy: NotImplementedError:", str(error).splitlines()[0][:120])
else:
    raise SystemExit("copy.deepcopy works: this is no finding any more")
PYTHON
