#!/usr/bin/env bash
# Guess: TCPStore takes a value of any length, or its `set` raises an error that names a limit and leaves the client in
# order.
# What it does: above 8 MiB the server (libuv, the default) drops the connection. The caller sees "Connection reset by
# peer", the limit stands on the server's stderr alone, and that client is of no use any more: each later call is a
# broken pipe. The same bytes appended in two parts are taken, and read back whole.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$place/venv/bin/python" -W ignore - 2>/dev/null <<'PYTHON'
import torch
import torch.distributed as dist

MOST = 8 << 20
server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
client = dist.TCPStore("127.0.0.1", server.port, is_master=False)
print("torch", torch.__version__)
client.set("most", b"x" * MOST)
print("8 MiB:", len(client.get("most")), "bytes read back")
client.append("parts", b"x" * MOST)
client.append("parts", b"x")
print("8 MiB and 1 byte, appended in two parts:", len(client.get("parts")), "bytes read back")
try:
    client.set("more", b"x" * (MOST + 1))
except dist.DistNetworkError as error:
    print("8 MiB and 1 byte at once:", str(error).splitlines()[0])
else:
    raise SystemExit("it takes more: this is no finding any more")
try:
    client.set("small", "1")
except dist.DistNetworkError as error:
    print("the same client afterwards:", str(error).splitlines()[0])
else:
    raise SystemExit("the client goes on: this is no finding any more")
server.set("small", "1")
print("other clients:", server.get("small"))
PYTHON
