"""What recipes of language models leave."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instep.data import Data
from instep.models.hf import save


def save_pretrained(model: Any, data: Data, folder: Path) -> Mapping[str, str]:
    """A model of `transformers` saved into hf/, where ``AutoModelForCausalLM.from_pretrained`` finds all it needs, and
    ``AutoTokenizer.from_pretrained`` the tokenizer, where the data have one.

    It is read back, offline, and must give the same logits. Raises RecordError where it does not.
    """
    save(model, folder / "hf")
    save_tokenizer: Any = getattr(data.codec, "save", None)
    if callable(save_tokenizer):
        save_tokenizer(folder / "hf")
    return {"saved for": "AutoModelForCausalLM.from_pretrained"}


def preferences(model: Any, data: Data, folder: Path, *, pairs: int = 8) -> Mapping[str, float]:
    """Some held-out pairs with their log-probabilities, to pairs.txt.

    The figure "preferred" is the share of all held-out pairs whose real text is likelier than the shuffled one for the
    model itself, without its reference.
    """
    from instep.data.cursor import load
    from instep.objectives.preference import sequence_log_probabilities

    held_out = data.held_out
    assert held_out is not None, "the recipe's data have some"
    device = next(model.parameters()).device
    lines: list[str] = []
    right = 0
    for start in range(0, len(held_out), 64):
        batch = load(held_out, range(start, min(start + 64, len(held_out))))
        log_ratios = {
            side: sequence_log_probabilities(model, [part.to(device) for part in batch[side]]).cpu()
            for side in ("chosen", "rejected")
        }
        right += int((log_ratios["chosen"] > log_ratios["rejected"]).sum())
        for place in range(len(log_ratios["chosen"])):
            if start + place < pairs:
                lines += [_shown(batch[side], place, side, float(log_ratios[side][place])) for side in log_ratios]
    (folder / "pairs.txt").write_text("\n".join(lines), encoding="utf-8")
    return {"preferred": right / len(held_out)}


def _shown(parts: Any, place: int, side: str, log_probability: float) -> str:
    inputs, targets = (part[place] for part in parts)
    tokens = [*inputs.tolist(), int(targets[-1])]
    prompt = int((targets < 0).sum()) + 1
    given, judged = (bytes(part).decode("utf-8", errors="replace") for part in (tokens[:prompt], tokens[prompt:]))
    return f"{side} ({log_probability:.1f}): {given!r} | {judged!r}"
