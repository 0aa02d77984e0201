"""A matrix product with its epilogue."""

import torch
from torch import Tensor

from mlmfast import backends


@torch.library.custom_op("mlmfast::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """``activation(x @ weight.T + bias)``.

    Args:
        x: ``[T, n]``.
        weight: ``[m, n]``, plain; a backend that packs weights keeps its packed copy to itself.
        bias: ``[m]`` or None.
        activation: ``"none"``, ``"gelu"`` (exact, through erf), ``"gelu_tanh"``, ``"relu"``, ``"tanh"`` or ``"geglu"``
            (``gelu(first half) * second half`` of the ``m`` outputs).

    Returns:
        ``[T, m]``, or ``[T, m / 2]`` for GeGLU, in the dtype of ``x``.

    Raises:
        ValueError: an unknown activation.
    """
    return backends.implementation("linear", x)(x, weight, bias, activation)


@linear.register_fake
def _(x, weight, bias=None, activation="none"):  # type: ignore[no-untyped-def]
    width = weight.shape[0]
    return x.new_empty(x.shape[0], width // 2 if activation == "geglu" else width)
