#!/usr/bin/env bash
# Guess: torch.utils._pytree keeps a PackedSequence whole, as one leaf, since it is a batch with methods of its own.
# What it does: it takes it for a named tuple and gives its four fields as leaves, `batch_sizes` among them, which must
# stay on the CPU. So tree_map over a batch, the usual way to move one to a device, raises, where PackedSequence.to works.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$place/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch.nn.utils.rnn import pack_sequence
from torch.utils import _pytree as pytree

packed = pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
leaves, structure = pytree.tree_flatten(packed)
print("torch", torch.__version__)
print("leaves:", len(leaves), " structure:", str(structure)[:60])
print("PackedSequence.to:", packed.to("meta").data.device, "with batch_sizes on", packed.to("meta").batch_sizes.device)
assert len(leaves) == 4
try:
    pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), packed)
except ValueError as error:
    print("tree_map_only: ValueError:", str(error)[:60])
else:
    raise SystemExit("tree_map_only moves it: this is no finding any more")
PYTHON
