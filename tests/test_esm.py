"""ESM-2 and ESM-1b: token dropout, both kinds of positions, proteins, and checkpoints as older code wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import TEXTS, bert_tokenizer, long_text, save
from families import FAMILIES, HOLDS, protein_tokenizer
from safetensors.torch import load_file, save_file
from transformers import EsmForMaskedLM, EsmTokenizer, PreTrainedTokenizerBase
from truth import ALL_METRICS, assert_near, assert_score, forward_of, reference_loop

import mlmfast
from mlmfast.errors import TextError

FREQUENCIES = "rotary_embeddings.inv_freq"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return bert_tokenizer()


def small(tokenizer: PreTrainedTokenizerBase, **options: Any) -> EsmForMaskedLM:
    return FAMILIES["esm"].small(len(tokenizer), **options)  # type: ignore[return-value]


ABSOLUTE = {"position_embedding_type": "absolute", "max_position_embeddings": HOLDS + 1}  # counted from pad + 1


@pytest.mark.parametrize("token_dropout", [True, False])
@pytest.mark.parametrize("emb_layer_norm_before", [True, False])
@pytest.mark.parametrize("positions", [{}, ABSOLUTE], ids=["rotary", "absolute"])
def test_every_embedding(
    tokenizer: PreTrainedTokenizerBase, token_dropout: bool, emb_layer_norm_before: bool, positions: dict[str, Any]
) -> None:
    """The last of each is ESM-2 and, with a norm, ESM-1b. A mask in the text itself counts as one, too."""
    model = small(tokenizer, token_dropout=token_dropout, emb_layer_norm_before=emb_layer_norm_before, **positions)
    lm, forward = mlmfast.load(model, tokenizer), forward_of(model)
    texts = [*TEXTS, "The [MASK] watches [MASK] lighthouse.", long_text(tokenizer, HOLDS)]
    assert lm.max_length == (HOLDS if positions else None)
    for metric in ALL_METRICS:
        for text, score in zip(texts, lm.score(texts, metric=metric)):
            assert_score(score, reference_loop(forward, tokenizer, text, metric), what=f"{metric} of {text!r}")
    if positions:
        with pytest.raises(TextError, match=f"{HOLDS + 1}.*{HOLDS}"):
            lm.score([long_text(tokenizer, HOLDS + 1)])


@pytest.mark.parametrize("positions", [{}, ABSOLUTE], ids=["rotary", "absolute"])
def test_more_masks_scale_more(tokenizer: PreTrainedTokenizerBase, positions: dict[str, Any]) -> None:
    """Generation and fill read copies with several masks; the factor is each copy's own, also among others."""
    model = small(tokenizer, **positions)
    lm, forward = mlmfast.load(model, tokenizer), forward_of(model)
    texts = ["The [MASK].", "[MASK] [MASK] [MASK] cat.", "A quiet [MASK] follow [MASK]!"]
    for text, fills in zip(texts, lm.fill(texts, top_k=3)):
        ids = tokenizer(text)["input_ids"]
        rows = forward(ids).log_softmax(-1)
        places = [i for i, token in enumerate(ids) if token == tokenizer.mask_token_id]
        for place, fill in zip(places, fills):
            best = rows[place].topk(3)
            assert fill.token_ids.tolist() == best.indices.tolist()
            assert_near(fill.logprobs, best.values.numpy())


def test_a_batch_that_shares_few_rows(tokenizer: PreTrainedTokenizerBase) -> None:
    """Where most rows differ they are not looked up, and each copy brings its own factor."""
    model = small(tokenizer)
    texts = ["The [MASK] [MASK] cat follow.", "A yellow", "every small pianist!"]
    for text, score in zip(texts, mlmfast.load(model, tokenizer).score(texts, metric="unmasked")):
        assert_score(score, reference_loop(forward_of(model), tokenizer, text, "unmasked"))


def test_proteins(tmp_path: Path) -> None:
    tokenizer = protein_tokenizer(tmp_path)
    assert len(tokenizer) == 33
    model = small(tokenizer, pad_token_id=1, mask_token_id=32, hidden_size=48, num_attention_heads=3)
    texts = ["MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ", "MDE", "WWWWCC"]
    for lm in (mlmfast.load(model, tokenizer), mlmfast.load(save(tmp_path / "esm", model, tokenizer))):
        for metric in ("original", "window", "global_l2r", "unmasked", "strided"):
            for text, score in zip(texts, lm.score(texts, metric=metric)):
                assert "".join(score.tokens) == text
                truth = protein_loop(model, tokenizer, text, metric)
                assert_near(score.logprobs, truth, what=f"{metric} of {text}")


def protein_loop(model: EsmForMaskedLM, tokenizer: EsmTokenizer, text: str, metric: str) -> np.ndarray:
    """The loop for a tokenizer that tells no offsets."""
    ids = tokenizer(text)["input_ids"]
    forward, found = forward_of(model), []
    positions = range(1, len(ids) - 1)
    for target in positions:
        masked = {
            "original": {target},
            "window": set(range(target, min(target + 3, len(ids) - 1))),
            "global_l2r": set(range(target, len(ids) - 1)),
            "unmasked": set(),
            "strided": {other for other in positions if other % 8 == target % 8},
        }[metric]
        row = forward([tokenizer.mask_token_id if i in masked else token for i, token in enumerate(ids)])[target]
        found.append(float(row.log_softmax(-1)[ids[target]]))
    return np.array(found)


def test_checkpoints_of_older_code(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """They keep the frequencies in each layer, or nowhere, and a table of positions that rotary models never read."""
    model = small(tokenizer)
    file = save(tmp_path, model, tokenizer) / "model.safetensors"
    weights = load_file(file)
    frequencies = weights.pop(next(name for name in weights if name.endswith(FREQUENCIES)))
    weights["esm.embeddings.position_embeddings.weight"] = torch.ones(HOLDS, 32)
    weights["esm.embeddings.position_ids"] = torch.arange(HOLDS)[None]
    layers = range(model.config.num_hidden_layers)
    # Those that are stored count, not what the config would give: they may have been rounded in training.
    each = {f"esm.encoder.layer.{i}.attention.self.{FREQUENCIES}": 1.5 * frequencies for i in layers}
    found = []
    for stored in (weights | each, weights):
        save_file(stored, file, {"format": "pt"})
        truth = reference_loop(forward_of(EsmForMaskedLM.from_pretrained(tmp_path)), tokenizer, TEXTS[0])
        found.append(mlmfast.load(tmp_path).score([TEXTS[0]])[0])
        assert_score(found[-1], truth)
    assert np.abs(found[0].logprobs - found[1].logprobs).max() > 0.01
    assert_score(found[1], reference_loop(forward_of(model), tokenizer, TEXTS[0]))
