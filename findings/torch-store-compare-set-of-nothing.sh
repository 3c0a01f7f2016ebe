#!/usr/bin/env bash
# Guess: Store.compare_set answers with what the store holds afterwards, so for a key that is not there, with an expected
# value that is not empty, it raises or gives an empty answer.
# What it does: it stores nothing and gives back the expected value, just as if the key held that. All stores agree. Who
# waits for a value to change, or compares the answer with what it expected, takes a key that is gone for one unchanged;
# only `check` tells.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$place"
"$place/venv/bin/python" -W ignore - <<'PYTHON'
import torch
import torch.distributed as dist

tcp = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
stores = {"TCPStore": tcp, "HashStore": dist.HashStore(), "FileStore": dist.FileStore("store", 1)}
print("torch", torch.__version__)
for name, store in stores.items():
    answer, there = store.compare_set("gone", "expected", "desired"), store.check(["gone"])
    print(f"{name}: compare_set('gone', 'expected', 'desired') gives {answer}; the key is there: {there}")
    if answer != b"expected" or there:
        raise SystemExit("it does otherwise now: this is no finding any more")
PYTHON
