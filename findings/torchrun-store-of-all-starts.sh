#!/usr/bin/env bash
# Guess: ranks that torchrun starts again meet in a store of that start alone, so that keys need no prefix by start.
# What torch does: by a rendezvous of c10d, as with --standalone, all starts share one, with no prefix. What a start left
# there the next one finds, also the addresses of gloo's ranks, who then connect to the dead ("Connection refused"): some
# starts are in vain, often several one after the other. With TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 each has its own.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$place/rank.py" <<'PYTHON'
import os, sys
import torch.distributed as dist
store, rank, size = next(dist.rendezvous("env://"))  # as init_process_group does
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    store.set("left by the first start", "its address")
    sys.exit(1)
print("found" if store.check(["left by the first start"]) else "nothing", flush=True)
PYTHON
"$place/venv/bin/python" - "$place/rank.py" <<'PYTHON'
import os, subprocess, sys
import torch

run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "1", sys.argv[1]]
found = []
for own in ("0", "1"):
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": own}
    done = subprocess.run(run, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    found.append(done.stdout.split()[-1])
print("torch", torch.__version__)
print(f"of what the first start left, the second has {found[0]}; with a store of its own, {found[1]}")
assert torch.__version__.startswith("2.13.0")
assert found == ["found", "nothing"], "each start has its own: this is no finding any more"
PYTHON
