#!/usr/bin/env bash
# Guess: a PrefixStore is a view of the keys below its prefix: `list_keys` gives those, and `num_keys` is their number.
# What it does: `list_keys` gives its own keys, without the prefix; `num_keys` counts those of the whole store beneath,
# whoever set them. To wait until n peers have written is wrong with it.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$place/venv/bin/python" -W ignore - <<'PYTHON'
import torch
import torch.distributed as dist

store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
one, other = dist.PrefixStore("one", store), dist.PrefixStore("other", store)
one.set("a", "1")
other.set("b", "1")
other.set("c", "1")
print("torch", torch.__version__)
print("list_keys:", one.list_keys(), " num_keys:", one.num_keys())
if one.list_keys() != ["a"] or one.num_keys() == 1:
    raise SystemExit("it does otherwise now: this is no finding any more")
PYTHON
