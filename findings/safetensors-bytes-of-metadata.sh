#!/usr/bin/env bash
# Guess: saving the same tensors with the same metadata twice gives the same bytes, so that a file can be told by its
# checksum and kept once in a store that goes by content.
# What it does: the order of the metadata's entries in the header is drawn anew at each save, in one process too. Tensors
# come in a fixed order. With one entry, or none, the bytes are the same each time.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 safetensors==0.8.0
"$place/venv/bin/python" - <<'PYTHON'
import numpy
import safetensors
from safetensors.numpy import save

tensors = {"b": numpy.ones(2, numpy.float32), "a": numpy.zeros(3, numpy.float32)}
several = {f"key {number}": "text" for number in range(12)}
print("safetensors", safetensors.__version__)
counts = {}
for name, metadata in (("none", None), ("1 entry", {"key": "text"}), ("12 entries", several)):
    counts[name] = len({save(tensors, metadata=metadata) for _ in range(20)})
    print(f"different files of 20 saves, metadata of {name}: {counts[name]}")
assert counts["none"] == counts["1 entry"] == 1
if counts["12 entries"] == 1:
    raise SystemExit("the bytes are the same now: this is no finding any more")
PYTHON
