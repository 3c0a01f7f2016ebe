#!/usr/bin/env bash
# Guess: a field of JSON lines that first comes in row 150 becomes a column with nulls before it, as pyarrow does, or is
# an error, as polars makes one of a CSV row with a field too many and of a value of another type.
# What it does: polars' read_ndjson (scan_ndjson too) knows the fields of the first 100 rows; later ones, and later ones
# inside a struct, are left out without a word. `infer_schema_length=None` keeps them.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check polars==2.1.0
"$place/venv/bin/python" - <<'PYTHON'
import io

import polars

flat = "".join(f'{{"text": "{row}"}}\n' for row in range(150)) + '{"text": "150", "label": 1}\n'
nested = "".join(f'{{"meta": {{"id": {row}}}}}\n' for row in range(150)) + '{"meta": {"id": 150, "label": 1}}\n'
print("polars", polars.__version__)
found = polars.read_ndjson(io.BytesIO(flat.encode()))
print("columns:", found.columns, " rows:", found.height)
inside = polars.read_ndjson(io.BytesIO(nested.encode()))["meta"].struct.fields
print("fields of the struct:", inside)
everything = polars.read_ndjson(io.BytesIO(flat.encode()), infer_schema_length=None)
print("with infer_schema_length=None:", everything.columns)
assert "label" in everything.columns
if "label" in found.columns or "label" in inside:
    raise SystemExit("it keeps them: this is no finding any more")
PYTHON
