"""Hidden states -> log-probabilities of given tokens; logits are never stored."""

import torch
from torch import Tensor

from mlmfast import backends


@torch.library.custom_op("mlmfast::vocab_logprob", mutates_args=())
def vocab_logprob(
    hidden: Tensor,
    vocabulary: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    target_rows: Tensor,
    temperature: float = 1.0,
    ranks: bool = False,
    entropies: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-softmax of ``(hidden @ vocabulary.T + bias) / temperature`` at the targets.

    Args:
        hidden: ``[R, d]``, the head's output.
        vocabulary: ``[V, d]``.
        bias: ``[V]`` or None.
        targets: int64 ``[N]``, token ids.
        target_rows: int64 ``[N]``, the row of ``hidden`` that each target is read from; rows may be shared.
        temperature: divides the logits.
        ranks: also rank the targets.
        entropies: also compute each row's entropy.

    Returns:
        log-probabilities ``[N]`` in nats; int64 ranks ``[N]``, one more than the number of tokens that are strictly
        more probable (empty unless asked for); entropies ``[R]`` in nats (empty unless asked for). Floats are float32,
        float64 for float64 inputs.
    """
    serve = backends.implementation("vocab_logprob", hidden)
    return serve(hidden, vocabulary, bias, targets, target_rows, temperature, ranks, entropies)


@vocab_logprob.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden, vocabulary, bias, targets, target_rows, temperature=1.0, ranks=False, entropies=False
):
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (
        hidden.new_empty(targets.shape[0], dtype=dtype),
        hidden.new_empty(targets.shape[0] if ranks else 0, dtype=torch.int64),
        hidden.new_empty(hidden.shape[0] if entropies else 0, dtype=dtype),
    )
