"""What the tests of ``add_layer_norm`` and ``pre_norm`` share: shapes, arguments, and both in plain torch."""

from __future__ import annotations

from typing import Any

from op_cases import randn
from torch import Tensor

SHAPES = [
    (1, 1),
    (2, 3),
    (1, 7),
    (2, 15),
    (2, 16),
    (2, 17),
    (5, 32),
    (3, 63),
    (2, 257),
    (64, 65),
    (70, 768),
    (2, 1000),
    (0, 16),
]


def plain(
    x: Tensor, residual: Tensor | None, bias: Tensor | None, weight: Tensor, norm_bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The sum and its LayerNorm."""
    rows = x + (0 if bias is None else bias) + (0 if residual is None else residual)
    centred = rows - rows.mean(1, keepdim=True)
    scaled = centred / (centred * centred).mean(1, keepdim=True).add(eps).sqrt()
    return rows, scaled * weight + (0 if norm_bias is None else norm_bias)


def arguments(rows: int, width: int, given: str = "residual bias norm_bias", eps: float = 1e-5) -> list[Any]:
    """``given`` names which of those are not None."""
    names = given.split()
    return [
        randn(rows, width, seed=1),
        3 * randn(rows, width, seed=2) if "residual" in names else None,
        2 * randn(width, seed=3) if "bias" in names else None,
        1 + 0.5 * randn(width, seed=4),
        randn(width, seed=5) if "norm_bias" in names else None,
        eps,
    ]
