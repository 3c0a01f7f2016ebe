"""A small GPT: a pre-norm transformer decoder with rotary positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instep.errors import DataError, RecipeError
from instep.models.sizes import check_sizes
from instep.restore import kept_module_state

EMBEDDING_STD = 0.02
"""Standard deviation of initial embeddings (Radford et al., 2019)."""

BIAS_STD = 2.0
"""Standard deviation of the initial biases of queries and keys, see `Attention`."""


class GPT(nn.Module):
    """A decoder-only transformer (Radford et al., 2019): tokens to the logits of the token that follows each.

    Arguments
    ---------
    vocabulary: number of token ids, V.
    context: most tokens that are seen at once.
    width: size of the residual stream, D; `heads` must divide it into an even size.
    depth: number of blocks.
    heads: attention heads of each block.
    dropout: share of activations dropped in training, after the embedding, in attention and before each residual sum.
    tied: the output layer shares the embedding's weights (Press and Wolf, 2017).

    Raises RecipeError for numbers that fit no model.
    """

    def __init__(
        self,
        *,
        vocabulary: int = 256,
        context: int = 128,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
        tied: bool = True,
    ) -> None:
        super().__init__()
        check_sizes("GPT", vocabulary=vocabulary, context=context, width=width, depth=depth, heads=heads)
        if width % (2 * heads):
            fitting = max(1, round(width / (2 * heads))) * 2 * heads
            raise RecipeError(
                f"a GPT of width {width} does not divide into {heads} heads of an even size; set 'width' to {fitting}."
            )
        if not 0 <= dropout < 1:
            raise RecipeError(f"a GPT's 'dropout' is {dropout}; it is a share, from 0 to below 1.")
        self.vocabulary, self.context, self.tied = vocabulary, context, tied
        self.head_size = width // heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.output.weight = self.embedding.weight
        nn.init.normal_(self.output.weight, std=EMBEDDING_STD)
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """Logits, [B, T, V], of the token that follows each of `tokens`, [B, T], int64. Raises DataError.

        documents: of which of several each token is, [B, T]; it sees those of the same one alone.
        """
        logits: Tensor = self.output(self.hidden(tokens, documents))
        return logits

    @property
    def head(self) -> nn.Linear:
        """Makes logits of what `hidden` gives."""
        return self.output

    def hidden(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """Hidden states, [B, T, D], which `head` makes the logits of; as in `forward`. Raises DataError."""
        length = tokens.shape[1]
        if length > self.context:
            raise DataError(
                f"{length} tokens are longer than the model's context of {self.context}; "
                f"shorten the samples, or raise the model's 'context'."
            )
        turns = rotary_turns(length, self.head_size, tokens.device)
        seen = None if documents is None else same_document(documents)
        x = self.dropout(self.embedding(tokens))
        for block in self.blocks:
            x = block(x, turns) if seen is None else block(x, turns, seen)
        normed: Tensor = self.norm(x)
        return normed


class Block(nn.Module):
    """Attention, then an MLP; each reads the normed residual stream, [B, T, D], and adds to it.

    Both read with a gain of about 1 and at first add nothing (as in Fixup, Zhang et al., 2019).
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = MLP(width, dropout)
        for reader in (self.attention.queries_keys_values, self.mlp.widen):
            nn.init.normal_(reader.weight, std=1 / math.sqrt(width))
        for writer in (self.attention.into_residual, self.mlp.into_residual):
            nn.init.zeros_(writer.weight)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], seen: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turns, seen)
        x = x + self.mlp(self.mlp_norm(x))
        return x


class Attention(nn.Module):
    """Causal self-attention with rotary positions.

    Queries and keys have biases that begin at random: turned by their positions, they give each head a preference of
    its own for some distances from the first step on, which it else takes long to find.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.into_residual = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.queries_keys_values.bias[: 2 * width], std=BIAS_STD)
        nn.init.zeros_(self.queries_keys_values.bias[2 * width :])

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], seen: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        qkv = self.queries_keys_values(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, D / heads]
        q, k = rotate(q, turns), rotate(k, turns)
        dropped = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropped, is_causal=seen is None)
        out: Tensor = self.dropout(self.into_residual(mixed.transpose(1, 2).reshape(batch, length, width)))
        return out


class MLP(nn.Module):
    """Two layers, four times as wide between, with a GELU."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.widen = nn.Linear(width, 4 * width, bias=False)
        self.into_residual = nn.Linear(4 * width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.into_residual(F.gelu(self.widen(x))))
        return out


def same_document(documents: Tensor) -> Tensor:
    """Which inputs each may look at, [B, 1, T, T]: itself and earlier ones of its document."""
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same.tril()


def rotary_turns(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [T, size / 2], by which `rotate` turns position t (Su et al., 2021)."""
    frequencies = 10_000.0 ** (-torch.arange(0, size, 2, device=device) / size)
    angles = torch.outer(torch.arange(length, device=device), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Turns each pair (i, i + size / 2) of the last dimension of `x`, [..., T, size], by its position's angle."""
    cos, sin = turns
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).type_as(x)


@torch.no_grad()
def generate(
    model: Callable[[Tensor], Any],
    tokens: Tensor,
    length: int,
    generator: torch.Generator | None = None,
    temperature: float = 0.8,
) -> Tensor:
    """`tokens` ([T], or [B, T], int64) followed by `length` tokens drawn from the model, one after the other.

    `model` maps [B, T] to logits [B, T, V], or to an object that has them as ``.logits``. It sees the last
    ``model.context`` tokens, where it has such an attribute, else all. Without a first token, token 0 is taken for one,
    and left out of the answer. `generator` is on the CPU. Temperature 0 takes the likeliest token. A module runs in
    eval mode, and gets its mode back.
    """
    if isinstance(model, nn.Module):
        with kept_module_state(model, training=False):
            return _generate(model, tokens, length, generator, temperature)
    return _generate(model, tokens, length, generator, temperature)


def _generate(
    model: Callable[[Tensor], Any], tokens: Tensor, length: int, generator: torch.Generator | None, temperature: float
) -> Tensor:
    rows = tokens if tokens.dim() == 2 else tokens[None]
    given = rows.shape[1] > 0
    if not given:
        rows = rows.new_zeros((rows.shape[0], 1))
    context = getattr(model, "context", None)
    for _ in range(length):
        seen = rows[:, -context:] if isinstance(context, int) else rows
        answer: Any = model(seen)
        logits = getattr(answer, "logits", answer)[:, -1].float().cpu()
        if temperature == 0:
            drawn = logits.argmax(dim=-1, keepdim=True)
        else:
            drawn = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator)
        rows = torch.cat((rows, drawn.to(rows.device)), dim=1)
    rows = rows if given else rows[:, 1:]
    return rows if tokens.dim() == 2 else rows[0]
