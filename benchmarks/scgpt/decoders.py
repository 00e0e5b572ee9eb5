"""The heads that scGPT is pretrained with, under the original's parameter names.

A frozen embedding uses none of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.scgpt.transformer import Config, Transformer


class ExpressionDecoder(nn.Module):
    """A token's output to its gene's binned value: three linear layers, leaky ReLU between."""

    def __init__(self, embsize: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(embsize, embsize),
            nn.LeakyReLU(),
            nn.Linear(embsize, embsize),
            nn.LeakyReLU(),
            nn.Linear(embsize, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(..., embsize)`` to ``(...)``."""
        return self.fc(x).squeeze(-1)

    @property
    def output(self) -> nn.Linear:
        """The layer whose output is in bins."""
        last = self.fc[-1]
        assert isinstance(last, nn.Linear)
        return last


class CellDecoder(nn.Module):
    """A cell's embedding `c` to a gene's value, ``(W q) . c`` with ``q = sigmoid(gene2query(g))``.

    The paper's gene expression prediction for cell modelling (GEPC): the value is read from
    ``<cls>`` alone, which is what makes ``<cls>`` describe the cell.
    """

    def __init__(self, embsize: int) -> None:
        super().__init__()
        self.gene2query = nn.Linear(embsize, embsize)
        self.W = nn.Linear(embsize, embsize, bias=False)

    def forward(self, cells: Tensor, genes: Tensor) -> Tensor:
        """``(n_cells, embsize)`` and ``(n_cells, length, embsize)`` to ``(n_cells, length)``."""
        queries = self.W(torch.sigmoid(self.gene2query(genes)))
        return torch.bmm(queries, cells.unsqueeze(2)).squeeze(2)


class ClassDecoder(nn.Module):
    """The original's classifier. Pretraining leaves it as it starts; it is there to be loaded."""

    def __init__(self, embsize: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.Linear(embsize, embsize), nn.ReLU(), nn.LayerNorm(embsize)]
        self._decoder = nn.ModuleList(layers)
        self.out_layer = nn.Linear(embsize, 1)


class PretrainedTransformer(Transformer):
    """The encoder with its heads, so that the original loads every one of its parameters."""

    def __init__(self, config: Config, n_tokens: int) -> None:
        super().__init__(config, n_tokens)
        self.decoder = ExpressionDecoder(config.embsize)
        self.cls_decoder = ClassDecoder(config.embsize).requires_grad_(False)
        self.mvc_decoder = CellDecoder(config.embsize)

    def predict(
        self, genes: Tensor, values: Tensor, padding: Tensor | None, asked: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Predict binned values.

        Parameters
        ----------
        genes, values, padding
            As in `forward`, ``(n_cells, length)``, values masked.
        asked
            Genes to predict from ``<cls>``, ``(n_cells, n_asked)``.

        Returns
        -------
        tuple of Tensor
            Values of `genes` from every token's own output, ``(n_cells, length)``, and of `asked`
            from ``<cls>``, ``(n_cells, n_asked)``.
        """
        output = self(genes, values, padding)
        return self.decoder(output), self.mvc_decoder(output[:, 0], self.encoder(asked))
