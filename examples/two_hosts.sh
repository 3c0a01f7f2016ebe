#!/bin/bash
# One run on two hosts. On the first: bash examples/two_hosts.sh 0 FIRST; on the other: bash examples/two_hosts.sh 1 FIRST.
# FIRST is the first host's name or address, as the other reaches it. An agent that dies is started again.
torchrun --nnodes 2 --node-rank "$1" --nproc-per-node 1 --master-addr "$2" --master-port 29500 --max-restarts 3 \
    -m instep train gpt --workers 8 --out runs/two-hosts
