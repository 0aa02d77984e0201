"""Rotary positions: queries or keys turned by their row's position."""

import torch
from torch import Tensor

from mlmfast import backends


@torch.library.custom_op("mlmfast::rotary", mutates_args=())
def rotary(x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
    """Rotates the first ``2 * half`` elements of each head; the others pass unchanged.

    Of ``x1``, the first ``half`` of them, and ``x2``, the next, it makes ``x1 * cos - x2 * sin`` and ``x2 * cos + x1 *
    sin``: Su et al. 2021 (arXiv 2104.09864), equation 34, with element ``i`` paired with element ``half + i``, as in
    Hugging Face's ``rotate_half``, where the paper pairs neighbours.

    Args:
        x: ``[T, H, D]``, queries or keys, possibly a view of a wider projection.
        cos, sin: float32 ``[P, half]``, of the angle of each pair at each position; ``2 * half <= D``. They are read in
            the dtype of the products.
        position_ids: int64 ``[T]``, rows of the tables.

    Returns:
        ``[T, H, D]``, contiguous, in the dtype of ``x``; products are in float32, in float64 for a float64 ``x``.
    """
    return backends.implementation("rotary", x)(x, cos, sin, position_ids)


@rotary.register_fake
def _(x, cos, sin, position_ids):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)
