"""Hidden states -> the most probable tokens; logits are never stored."""

import torch
from torch import Tensor

from mlmfast import backends


@torch.library.custom_op("mlmfast::vocab_topk", mutates_args=())
def vocab_topk(
    hidden: Tensor, vocabulary: Tensor, bias: Tensor | None, k: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The ``k`` best of log-softmax of ``(hidden @ vocabulary.T + bias) / temperature`` in each row.

    Args:
        hidden: ``[R, d]``, the head's output.
        vocabulary: ``[V, d]``.
        bias: ``[V]`` or None.
        k: how many, at most ``V``.
        temperature: divides the logits.

    Returns:
        log-probabilities ``[R, k]`` in nats, best first (float32, float64 for float64 inputs), and int64 token ids
        ``[R, k]``.
    """
    return backends.implementation("vocab_topk", hidden)(hidden, vocabulary, bias, k, temperature)


@vocab_topk.register_fake
def _(hidden, vocabulary, bias, k, temperature=1.0):  # type: ignore[no-untyped-def]
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.new_empty(hidden.shape[0], k, dtype=dtype), hidden.new_empty(hidden.shape[0], k, dtype=torch.int64)
