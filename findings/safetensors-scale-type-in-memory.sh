#!/usr/bin/env bash
# Guess: what safetensors saves it loads again, and from bytes just as from the file that holds them.
# What it does: torch.float8_e8m0fnu (the scales of MX formats) can be saved, and `load_file` gives it back; `load`, on
# the very same bytes, ends in a bare KeyError, since its own table of types lacks the name that `save` has written.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 safetensors==0.8.0
cd "$place"
"$place/venv/bin/python" -W ignore - <<'PYTHON'
import safetensors
import torch
from safetensors.torch import load, load_file, save

scales = torch.ones(2).to(torch.float8_e8m0fnu)
content = save({"scales": scales})
with open("scales.safetensors", "wb") as file:
    file.write(content)
found = load_file("scales.safetensors")["scales"]
print("torch", torch.__version__, " safetensors", safetensors.__version__)
print("load_file:", found.dtype, found.tolist() if found.dtype == torch.float32 else found.view(torch.uint8).tolist())
assert found.dtype == scales.dtype
try:
    load(content)
except KeyError as error:
    print("load of the same bytes: KeyError:", error)
else:
    raise SystemExit("load takes it: this is no finding any more")
PYTHON
