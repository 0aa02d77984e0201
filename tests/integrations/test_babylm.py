"""The BabyLM pipeline's functions against plain loops in its published conventions."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import sentences
from tool_loops import accuracies, completion_score, dataloader, next_piece, next_word
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from truth import assert_near

import mlmfast
from mlmfast.errors import RequestError
from mlmfast.integrations import babylm

Checkpoint = tuple[PreTrainedModel, PreTrainedTokenizerBase]
ARGS = Namespace(task="blimp", images_path=None, save_predictions=True, non_causal_batch_size=64)
TEMPERATURES = [0.5, 1.0, 2.5]


@pytest.fixture(scope="module", params=["bert", "roberta", "deberta"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    return request.getfixturevalue(f"{request.param}_model"), request.getfixturevalue(f"{request.param}_tokenizer")


def items(count: int) -> list[dict[str, Any]]:
    """A word with two completions, and pairs of whole sentences, by turns."""
    texts = sentences(2 * count)
    found = []
    for i, (one, other) in enumerate(zip(texts[::2], texts[1::2])):
        both = [one, other] if i % 2 else [f"No {one}", f"No {other}"]
        completions = both if i % 2 else [f" {one}", f" {other}"]
        metadata = {"UID": f"paradigm_{i % 2}", "field": "syntax", "ratio": (i * 7 % 5) / 5}
        item = {"sentences": both, "completions": completions, "label": i % 3 == 0, "uid": f"uid_{i % 2}"}
        found.append(item | {"metadata": metadata})
    return found


@pytest.mark.parametrize("lookback", [0, 1])  # --backend mlm, mntp
@pytest.mark.parametrize("temperatures", [[1.0], TEMPERATURES])
def test_zero_shot(checkpoint: Checkpoint, lookback: int, temperatures: list[float]) -> None:
    model, tokenizer = checkpoint
    chosen = items(5)
    batches = dataloader(tokenizer, chosen, 2, lookback)
    stats, predictions = babylm.compute_mlm_results(ARGS, model, batches, temperatures)
    assert list(stats) == list(predictions) == temperatures
    for t, temperature in enumerate(temperatures):
        scores = [
            [completion_score(model, tokenizer, *pair, temperature, lookback) for pair in zip(*texts)]
            for texts in ((item["sentences"], item["completions"]) for item in chosen)
        ]
        lm = mlmfast.load(model, tokenizer)
        totals = np.concatenate([babylm.completion_totals(lm, batch[1], temperatures) for batch in batches])
        assert_near(totals[:, :, t], np.array(scores))
        assert stats[temperature] == accuracies(model, tokenizer, chosen, temperature, lookback)
        picked = [item["completions"][np.argmax(score)] for item, score in zip(chosen, scores)]
        assert predictions[temperature] == {
            f"uid_{kind}": {
                "predictions": [{"id": f"uid_{kind}_{n}", "pred": pred} for n, pred in enumerate(picked[kind::2])]
            }
            for kind in (0, 1)
        }


def test_zero_shot_of_a_model_that_was_loaded(bert_model: PreTrainedModel, bert_tokenizer: Any) -> None:
    """Rows say where they are read, so the objective changes nothing."""
    batches = dataloader(bert_tokenizer, items(3), 2, lookback=1)
    args = Namespace(**vars(ARGS) | {"save_predictions": False})
    wanted = babylm.compute_mlm_results(args, bert_model, batches, [1.0])
    assert wanted[1] == {1.0: {}}
    for objective in ("mlm", "mntp"):
        lm = mlmfast.load(bert_model, bert_tokenizer, objective=objective)
        assert babylm.compute_mlm_results(args, lm, batches, [1.0]) == wanted
        assert_near(
            babylm.completion_totals(lm, batches[0][1], [1.0]),
            babylm.completion_totals(mlmfast.load(bert_model, bert_tokenizer), batches[0][1], [1.0]),
        )


def test_wug_is_a_correlation_over_all_items(bert_model: PreTrainedModel, bert_tokenizer: Any) -> None:
    """The pipeline's is that of its last batch alone."""
    stats_of = pytest.importorskip("scipy.stats")
    chosen = items(7)
    args = Namespace(**vars(ARGS) | {"task": "wug"})
    results = [
        babylm.compute_mlm_results(args, bert_model, dataloader(bert_tokenizer, chosen, batch), [1.0])
        for batch in (3, 7)
    ]
    shares = []
    for item in chosen:
        pairs = zip(item["sentences"], item["completions"])
        scores = np.array([completion_score(bert_model, bert_tokenizer, *pair) for pair in pairs])
        shares.append(1 / (1 + np.exp(scores[1] - scores[0])))
    wanted = stats_of.spearmanr(shares, [item["metadata"]["ratio"] for item in chosen])[0]
    for stats, predictions in results:
        assert stats[1.0]["UID"]["correlation"] == pytest.approx(wanted)
        assert predictions[1.0]["uid_0"]["predictions"][0]["prob"] == pytest.approx(shares[0], rel=1e-3)


@pytest.mark.parametrize("masks", [1, 3])
@pytest.mark.parametrize("lookback", [0, 1])
def test_reading(checkpoint: Checkpoint, masks: int, lookback: int) -> None:
    model, tokenizer = checkpoint
    function = (babylm.get_p2_mlm, babylm.get_p2_mntp)[lookback]
    several = []
    for context, word in [("The quiet gardener", " watches"), ("No", " sparrows"), ("Children", " unbelievable")]:
        found, split = function(context, word, model, tokenizer, num_mask_tokens=masks)
        pieces = tokenizer(word, add_special_tokens=False)["input_ids"]
        several.append(split)
        assert split == (len(pieces) > 1)
        assert_near(np.log([found]), np.log([next_word(model, tokenizer, context, word, masks, lookback)]))
        if not split:  # and by the text itself
            piece = next_piece(model, tokenizer, context, pieces[0], masks, lookback)
            assert_near(np.log([found]), np.log([piece]))
    assert 1 in several
    processor = Namespace(tokenizer=tokenizer)
    assert function("No", " sparrows", model, processor, masks) == function("No", " sparrows", model, tokenizer, masks)


def test_requests_that_cannot_be_served(bert_model: PreTrainedModel, bert_tokenizer: Any) -> None:
    batches = dataloader(bert_tokenizer, items(1), 1)
    for call in (
        lambda: babylm.compute_mlm_results(Namespace(images_path="here"), bert_model, batches, [1.0]),
        lambda: babylm.get_p2_mlm("The", "", bert_model, bert_tokenizer),
        lambda: babylm.get_p2_mlm("The", "cat", bert_model, bert_tokenizer, 0),
    ):
        with pytest.raises(RequestError):
            call()
    with pytest.raises(ImportError, match="folder of the BabyLM pipeline"):
        babylm.patch()


def test_the_pipelines_modules_run_with_these_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the pipeline, whose modules look their functions up as its own do."""
    package = tmp_path / "evaluation_pipeline"
    zero_shot, reading = package / "sentence_zero_shot", package / "reading"
    for folder in (package, zero_shot, reading):
        folder.mkdir()
        (folder / "__init__.py").touch()
    (zero_shot / "compute_results.py").write_text(
        "def compute_results(): return compute_mlm_results\ndef compute_mlm_results(): pass\n"
    )
    (reading / "evaluation_functions.py").write_text("def get_p2_mlm(): pass\ndef get_p2_mntp(): pass\n")
    (reading / "run.py").write_text(
        "import json, sys\n"
        "from evaluation_pipeline.reading.evaluation_functions import get_p2_mlm, get_p2_mntp\n"
        "from evaluation_pipeline.sentence_zero_shot.compute_results import compute_results\n"
        "if __name__ == '__main__':\n"
        "    found = [f.__module__ for f in (get_p2_mlm, get_p2_mntp, compute_results())]\n"
        "    open(sys.argv[1], 'w').write(json.dumps(found))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    output = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["babylm", "evaluation_pipeline.reading.run", str(output)])
    try:
        babylm.main()
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "evaluation_pipeline"]:
            del sys.modules[name]
    assert json.loads(output.read_text()) == [babylm.__name__] * 3


def test_without_a_module_it_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["babylm"])
    with pytest.raises(SystemExit, match="evaluation_pipeline"):
        babylm.main()
