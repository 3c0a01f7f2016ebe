#!/bin/bash
# One run on all nodes of a Ray cluster, from one of them: bash examples/ray.sh. Without a cluster, on this machine.
# To make one of two hosts, run on the first: ray start --head; on the other: ray start --address=FIRST:6379
run=runs/ray
if [ -d "$run" ]; then
    instep train --resume "$run" --workers 8 --team.launcher ray
else
    instep train gpt --out "$run" --workers 8 --team.launcher ray
fi
