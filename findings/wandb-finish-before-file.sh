#!/usr/bin/env bash
# Guess: when `finish()` of an offline run of Weights & Biases returns, the run's file holds the run, so that a script may
# copy or upload the folder next.
# What it does: the file is written by another process, and `finish()` may return while nothing but the file's header of
# 7 bytes is on the disk; the rest follows some milliseconds later. Not every time: 40 short runs are looked at below.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check wandb==0.31.0
cd "$place"
WANDB_SILENT=true WANDB_ERROR_REPORTING=false "$place/venv/bin/python" - <<'PYTHON'
import glob
import time

import wandb


def sizes(folder):
    return [len(open(path, "rb").read()) for path in glob.glob(f"{folder}/wandb/offline-run-*/*.wandb")]


early = 0
for number in range(40):
    folder = f"runs-{number}"
    with wandb.init(project="p", mode="offline", dir=folder, settings=wandb.Settings(console="off")) as run:
        for step in range(20):
            run.log({"loss": 1 / (1 + step)})
        run.finish()
        at_once = sizes(folder)
    time.sleep(0.5)
    early += at_once != sizes(folder)
print("wandb", wandb.__version__)
print(f"{early} of 40 runs were not on the disk when finish() returned")
if not early:
    raise SystemExit("it does otherwise now: this is no finding any more")
PYTHON
