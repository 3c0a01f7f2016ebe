#!/usr/bin/env bash
# Guess: with gradient_accumulation_steps=3 and an epoch of 4 batches, accelerate's last update, made of the one batch
# that is left, is that batch's mean gradient, as the others are means over theirs.
# What it does: `backward` divides each loss by 3 whatever the update comes to consist of, so the last update of every
# epoch that does not divide is too small: here by a factor of 3. (Batches and gradients are all the same below, so each
# update should be the same, -1.)
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 accelerate==1.15.0
"$place/venv/bin/python" -W ignore - <<'PYTHON'
import accelerate
import torch
from torch.utils.data import DataLoader

accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
model = torch.nn.Linear(1, 1, bias=False)
torch.nn.init.zeros_(model.weight)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(torch.ones(4, 1), batch_size=1))
weights = [0.0]
for batch in loader:
    with accelerator.accumulate(model):
        accelerator.backward(model(batch).mean())
        optimizer.step()
        optimizer.zero_grad()
    weights.append(model.weight.item())
updates = [round(after - before, 4) for before, after in zip(weights, weights[1:]) if after != before]
print("torch", torch.__version__, " accelerate", accelerate.__version__)
print("updates of an epoch of 4 equal batches, accumulated by 3:", updates)
if len(updates) != 2 or updates[0] != -1.0 or abs(updates[1] + 1 / 3) > 1e-3:
    raise SystemExit("it does otherwise now: this is no finding any more")
PYTHON
