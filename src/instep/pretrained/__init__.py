"""Models with weights that somebody has trained before: of an earlier run, or of a folder that transformers reads."""

from instep.pretrained.adapters import lora
from instep.pretrained.local import hf
from instep.pretrained.runs import run_model

__all__ = ["hf", "lora", "run_model"]
