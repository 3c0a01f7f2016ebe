#!/usr/bin/env bash
# Guess: pyarrow's reader of JSON lines keeps an integer exact, or refuses one that no 64-bit integer holds.
# What it does: without an error the whole column becomes double, so that ids of 20 digits and more, and their shorter
# neighbours in the column above 2^53, are rounded. An explicit schema of strings does not help: a number is no string
# then. With decimal128 given for the column they are kept.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1
"$place/venv/bin/python" - <<'PYTHON'
import io

import pyarrow
import pyarrow.json

lines = b'{"id": 9007199254740993}\n{"id": 12345678901234567890123}\n'
table = pyarrow.json.read_json(io.BytesIO(lines))
print("pyarrow", pyarrow.__version__)
print("type:", table.schema.field("id").type, " ids:", [f"{value:.0f}" for value in table["id"].to_pylist()])
try:
    options = pyarrow.json.ParseOptions(explicit_schema=pyarrow.schema([("id", pyarrow.string())]))
    print("as string:", pyarrow.json.read_json(io.BytesIO(lines), parse_options=options)["id"].to_pylist())
    as_text = True
except pyarrow.ArrowInvalid as error:
    print("as string: ArrowInvalid:", str(error)[:70])
    as_text = False
options = pyarrow.json.ParseOptions(explicit_schema=pyarrow.schema([("id", pyarrow.decimal128(38, 0))]))
try:
    exact = pyarrow.json.read_json(io.BytesIO(lines), parse_options=options)["id"].to_pylist()
    print("as decimal128:", exact)
except pyarrow.ArrowInvalid as error:
    print("as decimal128: ArrowInvalid:", str(error)[:70])
if table.schema.field("id").type != pyarrow.float64() or as_text:
    raise SystemExit("it does otherwise now: this is no finding any more")
PYTHON
