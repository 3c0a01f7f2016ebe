#!/usr/bin/env bash
# Guess: workers that torchrun started end when torchrun itself is killed (as by a scheduler, or for want of memory).
# What torch does: nothing ties them to it. They go on as orphans, hold their ports, memory and devices, and train on.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$place/worker.py" <<'PYTHON'
import os, pathlib, sys, time
rank = os.environ["RANK"]
pathlib.Path(sys.argv[1], f"pid-{rank}").write_text(str(os.getpid()))
for _ in range(600):
    time.sleep(0.1)
PYTHON
"$place/venv/bin/python" - "$place" <<'PYTHON'
import os, pathlib, signal, subprocess, sys, time
import torch

place = pathlib.Path(sys.argv[1])
command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
run = subprocess.Popen([*command, str(place / "worker.py"), str(place)], stderr=subprocess.DEVNULL)
while len(files := [file for file in place.glob("pid-*") if file.read_text()]) < 2:
    assert run.poll() is None, "torchrun ended before its workers were there"
    time.sleep(0.1)
workers = [int(file.read_text()) for file in files]
run.send_signal(signal.SIGKILL)
run.wait()
time.sleep(3)
alive = [pid for pid in workers if pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()]
parents = [int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in alive]
print("torch", torch.__version__)
print(f"torchrun was killed; after 3 s {len(alive)} of {len(workers)} workers run on; still its children: {run.pid in parents}")
for pid in alive:
    os.kill(pid, signal.SIGKILL)
assert torch.__version__.startswith("2.13.0")
assert len(alive) == 2, "workers end with torchrun: this is no finding any more"
PYTHON
