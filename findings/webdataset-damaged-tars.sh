#!/usr/bin/env bash
# Guess: a tar file that is cut, or has a damaged header in it, raises an error in WebDataset, at least where its samples
# end, as a file cut within the content of a member does.
# What it does: cut between two members, cut within a header, or with one header that is overwritten or zeroed, the file
# just ends there, and all samples behind are left out without a word: an epoch has fewer samples than there are. The
# reader is Python's tarfile, which takes a bad header that is not the first one, and a missing end, for the end.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check webdataset==1.0.2
cat > "$place/read.py" <<'PYTHON'
import io
import sys
import tarfile
from importlib import metadata

import webdataset

path = f"{sys.argv[1]}/samples.tar"
with tarfile.open(path, "w") as tar:
    for number in range(100):
        member, content = tarfile.TarInfo(f"{number:03}.cls"), str(number).encode()
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
with open(path, "rb") as file:
    whole = file.read()
middle = 40 * 1024  # each member takes 1,024 bytes: a header and its content, 512 each
files = {
    "whole": whole,
    "cut between two members": whole[:middle],
    "cut within a header": whole[: middle + 300],
    "cut within a content": whole[: middle + 700],
    "a header overwritten": whole[:middle] + b"x" * 512 + whole[middle + 512 :],
    "a header zeroed": whole[:middle] + bytes(512) + whole[middle + 512 :],
}
print("webdataset", metadata.version("webdataset"), "Python", sys.version.split()[0])
found = {}
for name, content in files.items():
    with open(path, "wb") as file:
        file.write(content)
    try:
        found[name] = sum(1 for _ in webdataset.WebDataset(path, shardshuffle=False))
    except Exception as error:
        found[name] = type(error).__name__
    print(f"{name}: {found[name]}")
silent = [name for name in files if name not in ("whole", "cut within a content") and found[name] == 40]
if found["whole"] != 100 or len(silent) != 4 or not isinstance(found["cut within a content"], str):
    raise SystemExit("it does otherwise now: this is no finding any more")
PYTHON
"$place/venv/bin/python" -W ignore "$place/read.py" "$place"
