"""The floor of a training step: the matrix products that its linear layers cannot do without."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def training_products(module: nn.Module, run: Callable[[], object]) -> Callable[[], None]:
    """Watch the linear layers of `module` in a `run`; return what does only their products.

    Of a layer with input ``x``, weight ``W`` and output gradient ``g`` these are ``x W'`` and
    ``g' x``, and ``g W`` where the input has a gradient, on operands laid out as in the layer,
    and allocated as there.
    """
    operands: list[tuple[Tensor, Tensor, Tensor, bool]] = []

    def watch(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0]
        weight: Tensor = layer.weight.detach()  # type: ignore[operator]
        operands.append((x.detach(), weight, torch.randn_like(output), x.requires_grad))

    linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    hooks = [layer.register_forward_hook(watch) for layer in linear]
    run()
    for hook in hooks:
        hook.remove()

    @torch.no_grad()
    def products() -> None:
        for x, weight, g, to_input in operands:
            torch.mm(x, weight.T)
            torch.mm(g.T, x)
            if to_input:
                torch.mm(g, weight)

    return products
