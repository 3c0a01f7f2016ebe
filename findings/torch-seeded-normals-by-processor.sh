#!/usr/bin/env bash
# Guess: a seeded generator of torch's for CPUs gives the same numbers on every x86 processor; only what is computed from
# them afterwards hangs on the processor's vector units.
# What torch does: normal numbers in float32, from 16 of them on, and uniform ones of a range other than 0 to 1, so also
# the first weights of a Linear, differ in their last bits between processors with AVX2 and those without. Fewer than
# 16, float64, bfloat16, uniform ones from 0 to 1, integers and permutations do not. So two kinds of processor can start
# a training from different weights under one seed. The variable below has torch take the kernels of older processors;
# this needs a processor that has AVX2.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$place/drawn.py" <<'PYTHON'
import hashlib
import json

import torch

torch.set_num_threads(1)


def told(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()[:12]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


drawn = {
    "normal, 15": torch.randn(15, generator=seeded()),
    "normal, 16": torch.randn(16, generator=seeded()),
    "normal, 1000": torch.randn(1000, generator=seeded()),
    "normal, float64": torch.randn(1000, dtype=torch.float64, generator=seeded()),
    "normal, bfloat16": torch.randn(1000, dtype=torch.bfloat16, generator=seeded()),
    "uniform, 0 to 1": torch.rand(1000, generator=seeded()),
    "uniform, -0.3 to 0.3": torch.empty(1000).uniform_(-0.3, 0.3, generator=seeded()),
    "integers": torch.randint(1000, (1000,), generator=seeded()),
    "permutation": torch.randperm(1000, generator=seeded()),
}
torch.manual_seed(5)
drawn["weights of a Linear"] = torch.nn.Linear(40, 25).weight.detach()
print(json.dumps([torch.__version__, torch.backends.cpu.get_cpu_capability(), {k: told(t) for k, t in drawn.items()}]))
PYTHON
ATEN_CPU_CAPABILITY=default "$place/venv/bin/python" "$place/drawn.py" > "$place/old.json"
ATEN_CPU_CAPABILITY=avx2 "$place/venv/bin/python" "$place/drawn.py" > "$place/new.json"
"$place/venv/bin/python" - "$place/old.json" "$place/new.json" <<'PYTHON'
import json
import sys

(version, before, old), (_, after, new) = (json.load(open(path)) for path in sys.argv[1:])
print("torch", version, "with the kernels", before, "and", after)
assert version.startswith("2.13.0") and (before, after) == ("DEFAULT", "AVX2"), "this processor has no AVX2"
for name in old:
    print(f"{name:22} {'the same' if old[name] == new[name] else 'other numbers'}")
other = [name for name in old if old[name] != new[name]]
expected = ["normal, 16", "normal, 1000", "uniform, -0.3 to 0.3", "weights of a Linear"]
assert other == expected, f"{other} differ: no finding as it is written any more"
PYTHON
