#!/usr/bin/env bash
# Guess: a causal model of transformers that is given rows of several documents, and `position_ids` that begin anew with
# each, keeps them apart, as its documentation of packed sequences says, whatever else is left at its default.
# What it does: it looks at the positions for that only where there is no cache of keys and values, and by default there
# is one, in training too (`use_cache` is true in most configurations, and makes an empty cache before the mask). Then
# each document attends to the ones before it, without a warning. With `use_cache=False` seven of eight families keep
# them apart; OPT takes position_ids and attends across documents all the same.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0
"$place/venv/bin/python" - <<'PYTHON' 2> "$place/errors" || { cat "$place/errors"; exit 1; }
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

torch.set_num_threads(1)
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
GROUPED = {**WIDE, "num_key_value_heads": 2}
FAMILIES = {
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "gemma": {**GROUPED, "head_dim": 16},
    "gpt_neox": WIDE,
    "phi": WIDE,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0},
    "opt": {**WIDE, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0},
}
rows = torch.arange(1, 13)[None]
other = rows.clone()
other[:, :6] += 20  # another first document
positions = torch.cat((torch.arange(6), torch.arange(6)))[None]
print("torch", torch.__version__, "transformers", transformers.__version__)
assert transformers.__version__ == "5.23.0"


@torch.no_grad()
def leaks(family: str, **call: bool) -> bool:
    """Whether logits of the second document depend on the first."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=64, **FAMILIES[family])).train()
    seen, changed = (model(tokens, position_ids=positions, **call).logits[:, 6:] for tokens in (rows, other))
    return float((seen - changed).abs().max()) > 1e-3 * float(seen.abs().max())


found = {family: (leaks(family), leaks(family, use_cache=False)) for family in FAMILIES}
for family, (by_default, without) in found.items():
    print(f"{family:9} the second document depends on the first: by default {by_default}, use_cache=False {without}")
assert all(by_default for by_default, _ in found.values()), "some keep documents apart by default now"
assert [family for family, (_, without) in found.items() if without] == ["opt"], "other families leak now"
PYTHON
