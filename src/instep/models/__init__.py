"""Small reference models that the recipes train. `instep.models.gpt` is a language model."""

from instep.models.gpt import GPT, generate

__all__ = ["GPT", "generate"]
