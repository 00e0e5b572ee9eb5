"""scGPT's encoder: gene embedding plus encoded value, then post-norm transformer layers.

Parameter names and shapes are those of scgpt 0.2.4's ``TransformerModel``, so that official
weights load by name. There is no positional encoding: a cell is a set of (gene, value) tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Values above it look the same to the value encoder, whatever the number of bins.
_MAX_VALUE = 512.0


@dataclass(frozen=True)
class Config:
    """What a checkpoint's ``args.json`` says about model and tokens.

    Attributes
    ----------
    embsize, n_heads, n_layers, d_hid
        Width, attention heads, layers, and width of the feed-forward part.
    dropout
        Dropout probability while training; embedding uses none.
    pad_token
        Token that fills up short cells.
    pad_value, mask_value
        Values of padding (and of ``<cls>``), and of a masked gene.
    n_bins
        Values per cell: zero and ``n_bins - 1`` quantile bins.
    """

    embsize: int
    n_heads: int
    n_layers: int
    d_hid: int
    dropout: float = 0.0
    pad_token: str = "<pad>"
    pad_value: int = -2
    mask_value: int = -1
    n_bins: int = 51

    def __post_init__(self) -> None:
        sizes = (self.embsize, self.n_heads, self.n_layers, self.d_hid)
        if min(sizes) < 1 or self.embsize % self.n_heads:
            raise ValueError(
                "scGPT config: expected positive sizes and an embedding width that the heads "
                f"divide; got embsize={self.embsize}, n_heads={self.n_heads}, "
                f"n_layers={self.n_layers}, d_hid={self.d_hid}."
            )
        if not 0 <= self.dropout < 1 or self.n_bins < 3:
            raise ValueError(
                "scGPT config: expected 0 <= dropout < 1 and n_bins >= 3; got "
                f"dropout={self.dropout}, n_bins={self.n_bins}."
            )


class GeneEncoder(nn.Module):
    """Token ids ``(...)`` to normalised embeddings ``(..., embsize)``."""

    def __init__(self, n_tokens: int, embsize: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_tokens, embsize)
        self.enc_norm = nn.LayerNorm(embsize)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)

    def forward(self, genes: Tensor) -> Tensor:
        """Look up and normalise."""
        return self.enc_norm(self.embedding(genes))


class ValueEncoder(nn.Module):
    """Binned values ``(...)`` to normalised embeddings ``(..., embsize)``."""

    def __init__(self, embsize: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(1, embsize)
        self.linear2 = nn.Linear(embsize, embsize)
        self.norm = nn.LayerNorm(embsize)
        self.dropout = nn.Dropout(dropout)

    def forward(self, values: Tensor) -> Tensor:
        """Two linear layers with a ReLU between, then normalise."""
        hidden = F.relu(self.linear1(values.unsqueeze(-1).clamp(max=_MAX_VALUE)))
        return self.dropout(self.norm(self.linear2(hidden)))


class Attention(nn.Module):
    """Multi-head self-attention, ``softmax(Q K' / sqrt(d)) V`` per head."""

    def __init__(self, embsize: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embsize, embsize))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embsize))
        self.out_proj = nn.Linear(embsize, embsize)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, mask: Tensor | None, queries: Tensor) -> Tensor:
        """Attend from `queries` to `x`.

        Parameters
        ----------
        x
            All tokens, ``(n_cells, length, embsize)``.
        mask
            True where a token may be attended to, ``(n_cells, 1, 1, length)``; None for all.
        queries
            The tokens whose output is wanted, the first ones of `x`,
            ``(n_cells, n_queries, embsize)``.
        """
        width = x.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if queries is x:
            q, k, v = F.linear(x, weight, bias).chunk(3, dim=-1)
        else:
            q = F.linear(queries, weight[:width], bias[:width])
            k, v = F.linear(x, weight[width:], bias[width:]).chunk(2, dim=-1)
        q, k, v = (self._split(part) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
        )
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """``(n_cells, length, embsize)`` to ``(n_cells, n_heads, length, embsize / n_heads)``."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)


class Layer(nn.Module):
    """Post-norm layer: ``y = norm1(x + attention(x))``, then ``norm2(y + feed_forward(y))``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.self_attn = Attention(config.embsize, config.n_heads, config.dropout)
        self.linear1 = nn.Linear(config.embsize, config.d_hid)
        self.linear2 = nn.Linear(config.d_hid, config.embsize)
        self.norm1 = nn.LayerNorm(config.embsize)
        self.norm2 = nn.LayerNorm(config.embsize)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None, first_only: bool = False) -> Tensor:
        """All tokens ``(n_cells, length, embsize)``, or with `first_only` the first alone."""
        # Only a position's own query decides its output, so <cls> alone costs one query.
        queries = x[:, :1] if first_only else x
        y = self.norm1(queries + self.dropout(self.self_attn(x, mask, queries)))
        hidden = self.linear2(self.dropout(F.relu(self.linear1(y))))
        return self.norm2(y + self.dropout(hidden))


class Layers(nn.Module):
    """The stack of layers, under the name that torch's ``TransformerEncoder`` gives it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))


class Transformer(nn.Module):
    """What an embedding needs of scGPT.

    Parameters
    ----------
    config
        Sizes.
    n_tokens
        Length of the vocabulary, special tokens included.
    """

    def __init__(self, config: Config, n_tokens: int) -> None:
        super().__init__()
        self.config = config
        self.encoder = GeneEncoder(n_tokens, config.embsize)
        self.value_encoder = ValueEncoder(config.embsize, config.dropout)
        self.transformer_encoder = Layers(config)

    def forward(self, genes: Tensor, values: Tensor, padding: Tensor | None) -> Tensor:
        """Encode every token.

        Parameters
        ----------
        genes, values
            Token ids and binned values, ``(n_cells, length)``.
        padding
            True at padding, ``(n_cells, length)``; None if there is none.

        Returns
        -------
        Tensor
            ``(n_cells, length, embsize)``; what stands at padding means nothing.
        """
        return self.encode(self.encoder(genes) + self.value_encoder(values), padding)

    def encode(self, x: Tensor, padding: Tensor | None, first_only: bool = False) -> Tensor:
        """Run the layers on embedded tokens ``(n_cells, length, embsize)``.

        With `first_only`, the last layer computes position 0 alone, ``(n_cells, 1, embsize)``:
        the same numbers for a fraction of that layer's work.
        """
        mask = None if padding is None else ~padding[:, None, None, :]
        layers: Iterable[nn.Module] = self.transformer_encoder.layers
        for i, layer in enumerate(layers, start=1):
            x = layer(x, mask, first_only=first_only and i == self.config.n_layers)
        return x

    def tables(self) -> tuple[Tensor, Tensor]:
        """Every token's and every value's embedding, computed once instead of per token.

        Returns
        -------
        tuple of Tensor
            ``(n_tokens, embsize)``, and ``(n_bins, embsize)`` with `pad_value` in row 0 and bin
            ``b`` in row ``b``: expressed genes are never in bin 0.
        """
        weight = self.encoder.embedding.weight
        levels = torch.arange(self.config.n_bins, dtype=weight.dtype, device=weight.device)
        levels[0] = self.config.pad_value
        return self.encoder.enc_norm(weight), self.value_encoder(levels)


def n_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(math.prod(p.shape) for p in model.parameters() if p.requires_grad)
