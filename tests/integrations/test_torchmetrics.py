"""InfoLM against torchmetrics' own code, on small random checkpoints that both load.

torchmetrics pairs sentences wrongly where its sort by length is not its own inverse, so it is asked about two pairs at
most, or about texts that are sorted already, no two of one length.
"""

from __future__ import annotations

import builtins
import importlib
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from truth import assert_near, forward_of, special_ids

import mlmfast
from mlmfast.errors import RequestError
from mlmfast.model import MaskedLM

pytest.importorskip("torchmetrics", reason='pip install "mlmfast[torchmetrics]"')
import torchmetrics
from torchmetrics.functional.text.infolm import infolm as their_infolm

from mlmfast.integrations import torchmetrics as ours
from mlmfast.integrations.torchmetrics import InfoLM, infolm

MODELS = ("bert", "roberta", "deberta")
# Each measure with the parameters that it needs.
MEASURES: dict[str, dict[str, float]] = {
    "kl_divergence": {},
    "alpha_divergence": {"alpha": 0.25},
    "beta_divergence": {"beta": 0.5},
    "ab_divergence": {"alpha": 0.25, "beta": 0.5},
    "renyi_divergence": {"alpha": 0.75},
    "l1_distance": {},
    "l2_distance": {},
    "l_infinity_distance": {},
    "fisher_rao_distance": {},
}
# Shortest first on both sides, whatever the tokenizer makes of them; rows are pairs.
PREDS = [
    "A cat.",
    "The small dogs follow a cat.",
    "Every quiet pianist watches the yellow sparrows in the rain.",
    "The unbelievable lighthouse has forgotten no remarkable grandmother, the hungry children and some cat, slowly.",
]
TARGET = [
    "The cat!",
    "No hungry children remembers it!",
    "Some pianist watches every small sparrows before breakfast, slowly.",
    "A remarkable lighthouse has forgotten the grandmother, and no cat are humming to the hungry yellow children here.",
]
LONGEST = 40  # tokens: the last texts are cut, with all three tokenizers


@pytest.fixture(scope="module")
def folders(bert_folder: Path, roberta_folder: Path, deberta_folder: Path) -> dict[str, str]:
    return {"bert": str(bert_folder), "roberta": str(roberta_folder), "deberta": str(deberta_folder)}


def both(folder: str, preds: Any, target: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Our sentence scores and torchmetrics', whose means agree with them."""
    options = {"verbose": False, "max_length": LONGEST, "return_sentence_level_score": True} | options
    found = [one(preds, target, folder, **options) for one in (infolm, their_infolm)]
    for mean, scores in found:
        assert mean.dtype == scores.dtype == torch.float32 and mean.shape == ()
        torch.testing.assert_close(mean, scores.mean())
    return found[0][1], found[1][1]


@pytest.mark.parametrize("idf", [True, False])
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("model", MODELS)
def test_every_measure(folders: dict[str, str], model: str, measure: str, idf: bool) -> None:
    options = {"information_measure": measure, "idf": idf, **MEASURES[measure]}
    mine, theirs = both(folders[model], PREDS, TARGET, **options)
    assert theirs.std() > 1e-3  # else nothing would be compared
    assert_near(mine.numpy(), theirs.numpy(), what=f"{measure} of {model}")


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 0.5}, {"max_length": 7, "idf": False}])
@pytest.mark.parametrize("model", MODELS)
def test_every_option(folders: dict[str, str], model: str, options: dict[str, Any]) -> None:
    # At seven tokens the last texts are equally long, and torchmetrics' sort of them is anybody's guess.
    pairs = slice(0, 2) if "max_length" in options else slice(None)
    mine, theirs = both(folders[model], PREDS[pairs], TARGET[pairs], **options)
    assert_near(mine.numpy(), theirs.numpy(), what=f"{options} of {model}")
    plain, _ = both(folders[model], PREDS[pairs], TARGET[pairs], idf=options.get("idf", True))
    assert (mine - plain).abs().max() > 1e-3


@pytest.mark.parametrize("model", MODELS)
def test_batches(folders: dict[str, str], model: str) -> None:
    """torchmetrics cuts the tokens of a batch to its longest text and forgets to cut their weights."""
    mine, theirs = both(folders[model], PREDS, TARGET, batch_size=1, idf=False)
    assert_near(mine.numpy(), theirs.numpy(), what=model)
    with pytest.raises(RuntimeError, match="must match the size"):
        their_infolm(PREDS, TARGET, folders[model], batch_size=1, verbose=False, max_length=LONGEST)
    options: dict[str, Any] = {"verbose": False, "max_length": LONGEST}
    few = infolm(PREDS, TARGET, folders[model], batch_size=1, **options)
    torch.testing.assert_close(few, their_infolm(PREDS, TARGET, folders[model], **options), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_texts_in_any_order(folders: dict[str, str], model: str) -> None:
    """Where torchmetrics pairs wrongly, ours are its scores of one pair at a time."""
    order = [3, 0, 2, 1]
    preds, target = [PREDS[i] for i in order], [TARGET[i] for i in order]
    mine, theirs = both(folders[model], preds, target, idf=False)
    alone = [both(folders[model], [p], [t], idf=False)[1][0] for p, t in zip(preds, target)]
    assert_near(mine.numpy(), np.array(alone), what=model)
    assert (theirs - mine).abs().max() > 0.01  # torchmetrics' bug, which docs/torchmetrics.md names


@pytest.mark.parametrize("temperature", [0.25, 0.1])
def test_what_it_is(bert_folder: Path, temperature: float) -> None:
    """From the definition alone. At 0.1 torchmetrics rounds probabilities to 0 (float32), and the divergence too."""
    lm = mlmfast.load(bert_folder, device="cpu")
    forward, tokenizer = forward_of(lm.model), lm.tokenizer
    means = []
    for text in (PREDS[1], TARGET[1]):
        ids = tokenizer(text)["input_ids"]
        rows = []
        for place, token in enumerate(ids):
            if token not in special_ids(tokenizer):
                masked = [tokenizer.mask_token_id if i == place else t for i, t in enumerate(ids)]
                rows.append((forward(masked)[place] / temperature).softmax(0))
        means.append(torch.stack(rows).mean(0))
    wanted = (means[1] * (means[0] / means[1]).log()).sum()
    mine, theirs = both(str(bert_folder), PREDS[1], TARGET[1], idf=False, temperature=temperature)
    assert_near(mine.numpy(), wanted[None].numpy())
    assert (float(theirs) == 0) == (temperature == 0.1)


@pytest.mark.parametrize("model", MODELS)
def test_class(folders: dict[str, str], model: str) -> None:
    """In batches, reset, cloned, and against torchmetrics' class."""
    options: dict[str, Any] = {"verbose": False, "max_length": LONGEST, "return_sentence_level_score": True}
    metric, theirs = InfoLM(folders[model], **options), torchmetrics.text.infolm.InfoLM(folders[model], **options)
    assert isinstance(metric, type(theirs)) and metric.higher_is_better is theirs.higher_is_better is True
    for one in (metric, theirs):
        for preds, target in zip(PREDS, TARGET):
            one.update([preds], target)
    wanted = theirs.compute()[1]
    assert_near(metric.compute()[1].numpy(), wanted.numpy())
    for other in (metric.clone(), pickle.loads(pickle.dumps(metric))):
        other.update(PREDS[0], TARGET[0])
        assert len(other.compute()[1]) == len(PREDS) + 1
        assert next(other.model.parameters()) is not next(metric.model.parameters())
        assert next(other.model.parameters()) is next(other.lm.model.parameters())
    assert len(metric.compute()[1]) == len(PREDS)
    metric.reset()
    with pytest.warns(UserWarning, match="compute"), pytest.raises(RequestError, match="update"):
        metric.compute()
    metric.idf = False
    first = metric(PREDS[0], TARGET[0])[1]  # forward: this batch's score
    assert_near(first.numpy().reshape(1), both(folders[model], PREDS[0], TARGET[0], idf=False)[1].numpy())


def test_a_metric_among_others(bert_folder: Path) -> None:
    """Several processes gather states of different lengths; a collection clones and moves its metrics."""
    collection = torchmetrics.MetricCollection({"infolm": InfoLM(bert_folder, verbose=False, idf=False)})
    collection.update(PREDS, TARGET)
    alone = infolm(PREDS, TARGET, bert_folder, verbose=False, idf=False)
    torch.testing.assert_close(collection.to("cpu").clone().compute()["infolm"], alone)
    metric = collection["infolm"]
    other = metric.clone()
    other.reset()
    other.update(PREDS[:1], TARGET[:1])
    for name in (
        "preds_input_ids",
        "preds_lengths",
        "target_input_ids",
        "target_lengths",
    ):  # as a gathering leaves them
        setattr(metric, name, torch.cat([*getattr(metric, name), *getattr(other, name)]))
    metric._computed = None
    metric.return_sentence_level_score = True
    assert_near(metric.compute()[1][-1].numpy(), metric.compute()[1][0].numpy())


def test_models(bert_folder: Path, bert_model: Any, bert_tokenizer: Any) -> None:
    """A folder, a MaskedLM, a live model, and what does not go together."""
    options: dict[str, Any] = {"verbose": False, "idf": False}
    wanted = infolm(PREDS, TARGET, bert_folder, **options)
    for model, tokenizer in ((mlmfast.load(bert_folder, device="cpu"), None), (bert_model, bert_tokenizer)):
        torch.testing.assert_close(infolm(PREDS, TARGET, model, tokenizer=tokenizer, **options), wanted)
    with pytest.raises(RequestError, match="tokenizer"):
        infolm(PREDS, TARGET, bert_model, **options)
    with pytest.raises(RequestError, match="stays on cpu"):
        infolm(PREDS, TARGET, mlmfast.load(bert_model, bert_tokenizer), device="cuda", **options)
    with pytest.raises(RequestError, match="4 preds.*3 targets"):
        infolm(PREDS, TARGET[:3], bert_folder, **options)
    with pytest.raises(RequestError, match="preds holds no text"):
        infolm([], [], bert_folder, **options)
    with pytest.raises(RequestError, match="target 0 has .* holds 48: pass max_length=48"):
        infolm("A cat.", " ".join(PREDS), bert_folder, max_length=200, **options)
    assert infolm("A cat.", " ".join(PREDS), bert_folder, **options) != 0  # unless told otherwise, cut to what it holds
    with pytest.raises(ValueError, match="alpha"):
        infolm(PREDS, TARGET, bert_folder, information_measure="renyi_divergence", **options)


@pytest.mark.parametrize("measure", MEASURES)
def test_equal_texts_are_no_distance_apart(bert_folder: Path, measure: str) -> None:
    """The arccosine of what float32 probabilities lack to a sum of 1 would be a distance of 3e-4."""
    options: dict[str, Any] = {"information_measure": measure, "idf": False, "verbose": False, **MEASURES[measure]}
    scores = infolm(PREDS, PREDS, bert_folder, return_sentence_level_score=True, **options)[1]
    assert float(scores.abs().max()) < 1e-6


@pytest.mark.parametrize("longest", [0, 2])
def test_a_length_without_room(bert_folder: Path, longest: int) -> None:
    with pytest.raises(RequestError, match=f"max_length={longest} leaves no room"):
        infolm(PREDS, TARGET, bert_folder, max_length=longest, verbose=False)


def test_nothing_to_compare(bert_folder: Path) -> None:
    """torchmetrics gives 0 of a text without weights, and so do we, but with a warning."""
    for preds, target, idf in (("", "A cat.", False), ("A cat.", "A cat!", True)):
        with pytest.warns(UserWarning, match="no token with a weight"):
            mine, theirs = both(str(bert_folder), preds, target, idf=idf)
        assert mine.tolist() == theirs.tolist() == [0.0]


def test_memory_is_bounded(bert_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs are compared a group at a time, rows are added up a chunk at a time, and a batch may run out of memory."""
    lm = mlmfast.load(bert_folder, device="cpu")
    whole = infolm(PREDS, TARGET, lm, verbose=False, return_sentence_level_score=True)[1]
    taken: list[int] = []
    visit = MaskedLM.visit

    def watched(self: MaskedLM, sequences: Any, take: Any, **options: Any) -> None:
        taken.append(len(sequences))
        visit(self, sequences, take, **options)

    monkeypatch.setattr(ours, "HELD", 4 * lm.spec().head.vocab_size)
    monkeypatch.setattr(MaskedLM, "visit", watched)
    parted = infolm(PREDS, TARGET, lm, verbose=False, return_sentence_level_score=True)[1]
    assert taken == [4, 4]
    assert_near(parted.numpy(), whole.numpy(), 1e-5)


def test_missing_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.split(".")[0] == "torchmetrics":
            raise ImportError(name)
        return real(name, *arguments, **options)

    name = "mlmfast.integrations.torchmetrics"
    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"mlmfast\[torchmetrics\]"):
        importlib.import_module(name)
