"""Hidden states -> whole distributions, for those who need every token's log-probability."""

import torch
from torch import Tensor

from mlmfast import backends


@torch.library.custom_op("mlmfast::vocab_rows", mutates_args=())
def vocab_rows(hidden: Tensor, vocabulary: Tensor, bias: Tensor | None, temperature: float = 1.0) -> Tensor:
    """Log-softmax of ``(hidden @ vocabulary.T + bias) / temperature``.

    This one does hold ``[r, V]``: callers hand it a chunk of rows at a time.

    Args:
        hidden: ``[r, d]``, the head's output.
        vocabulary: ``[V, d]``.
        bias: ``[V]`` or None.
        temperature: divides the logits.

    Returns:
        ``[r, V]`` in nats, float32 (float64 for float64 inputs).
    """
    return backends.implementation("vocab_rows", hidden)(hidden, vocabulary, bias, temperature)


@vocab_rows.register_fake
def _(hidden, vocabulary, bias, temperature=1.0):  # type: ignore[no-untyped-def]
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.new_empty(hidden.shape[0], vocabulary.shape[0], dtype=dtype)
