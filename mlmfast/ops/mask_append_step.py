"""One incremental decoding step. **Approximate**: rows that it does not compute stay as they were.

It is the one op that is made of the others, so it has no kernels and no schema of its own: every product, attention
and norm in it is served by the backend that serves that op for a few rows, and on a GPU the step, up to the vocabulary
op that reads its result, is recorded as one CUDA graph (:mod:`mlmfast.graphs`) whose buffers are the cache and the
packed step.
"""

from __future__ import annotations

from torch import Tensor

from mlmfast.architectures.spec import EncoderSpec
from mlmfast.cache import Cache, StepBatch
from mlmfast.encoder import encode, predict


def mask_append_step(spec: EncoderSpec, batch: StepBatch, mask_token_id: int, cache: Cache) -> Tensor:
    """The rows that changed, through the whole model, beside the cached keys and values of the others.

    A new token has replaced the first mask, and a mask was appended. Computed are the last tokens, as many as the
    caller recomputes, the masks, and what follows them; only scored rows pass the last layer and the head. With all
    rows in the batch this is the exact pass.

    Args:
        spec: the model.
        batch: the rows, ``T`` of them, ``R`` scored; on the weights' device.
        mask_token_id: what a masked row reads.
        cache: keys and values of every layer; those of the batch's rows are overwritten.

    Returns:
        the head's hidden states ``[R, e]``, ready for a vocabulary op.
    """
    return predict(spec, encode(spec, batch, mask_token_id, cache))
