#!/usr/bin/env bash
# Guess: the fingerprint of a data set of Hugging Face that load_from_disk gives tells whether its content is what it
# was; caches of `map` are keyed by it.
# What it does: it looks neither into the data files nor at their times: with a value changed in one of them it is the
# same, and `map` then gives the result that it has cached for the old value.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1
cat > "$place/changed.py" <<'PYTHON'
import sys

import datasets

datasets.disable_progress_bars()
folder = f"{sys.argv[1]}/saved"
datasets.Dataset.from_dict({"number": list(range(1000, 1060))}).save_to_disk(folder)


def doubled(row):
    return {"doubled": 2 * row["number"]}


before = datasets.load_from_disk(folder)
known = before._fingerprint
first = before.map(doubled)[30]
path = before.cache_files[0]["filename"]
del before
with open(path, "rb") as file:
    content = file.read()
with open(path, "wb") as file:
    file.write(content.replace((1030).to_bytes(8, "little"), (7).to_bytes(8, "little")))
after = datasets.load_from_disk(folder)
mapped = after.map(doubled)[30]
print("datasets", datasets.__version__)
print("fingerprints:", known, after._fingerprint)
print("row 30:", first, "before;", after[30], "after, and mapped:", mapped)
assert after[30] == {"number": 7}
if known != after._fingerprint or mapped != first:
    raise SystemExit("it does otherwise now: this is no finding any more")
PYTHON
HF_HOME="$place/home" HF_HUB_OFFLINE=1 "$place/venv/bin/python" "$place/changed.py" "$place"
