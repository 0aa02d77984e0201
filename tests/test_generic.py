"""Any other masked language model of transformers, by its own code, against the plain loop over it.

Model types are taken as if none of them had a file in mlmfast/architectures, whatever there is today.
"""

from __future__ import annotations

import copy
import json
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from appending import appending, loop
from checkpoints import TEXTS, bert_tokenizer, perturb, roberta_tokenizer, save, sentences, small_bert
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import MaskedLMOutput
from truth import ALL_METRICS, assert_equals_the_loop, assert_near, assert_score, forward_of, reference_loop
from typer.testing import CliRunner

import mlmfast
from mlmfast import cli, doctor, execution, generic
from mlmfast.architectures import FAMILIES
from mlmfast.budget import CPU_BYTES, row_bytes
from mlmfast.errors import (
    BackendError,
    CheckpointError,
    MLMFastError,
    RequestError,
    TextError,
    UnsupportedModelError,
)
from mlmfast.model import MaskedLM

HOLDS = 48
BERT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": HOLDS,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}
ROBERTA = BERT | {"max_position_embeddings": HOLDS + 2, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
XLM: dict[str, Any] = {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": HOLDS, "pad_index": 0}
BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": HOLDS,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
FUNNEL = {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48}
# A model type, and settings of a small one.
TYPES: dict[str, dict[str, Any]] = {
    "roberta-prelayernorm": ROBERTA,
    "megatron-bert": BERT,
    "convbert": BERT | {"embedding_size": 32},
    "mobilebert": BERT | {"embedding_size": 20, "intra_bottleneck_size": 32, "num_feedforward_networks": 2},
    "fnet": BERT,
    "funnel": FUNNEL,
    "nystromformer": BERT,
    "big_bird": BERT,
    "roformer": BERT,
    "xlm": XLM,
    "luke": ROBERTA | {"entity_vocab_size": 10, "entity_emb_size": 8},
    "layoutlm": BERT | {"max_2d_position_embeddings": 16},
    "bart": BART,
    "ibert": ROBERTA,
    "squeezebert": BERT | {"embedding_size": 32},
}


@pytest.fixture(autouse=True)
def no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for model_type in [*TYPES, "esm"]:
        monkeypatch.delitem(FAMILIES, model_type, raising=False)


@cache
def bert_pieces() -> PreTrainedTokenizerBase:
    return bert_tokenizer()


@cache
def roberta_pieces() -> PreTrainedTokenizerBase:
    return roberta_tokenizer()


def tokenizer_of(model_type: str) -> PreTrainedTokenizerBase:
    return roberta_pieces() if TYPES.get(model_type, {}).get("pad_token_id") == 1 else bert_pieces()


def small(model_type: str, **options: Any) -> PreTrainedModel:
    settings = TYPES.get(model_type, {}) | {"vocab_size": len(tokenizer_of(model_type))} | options
    torch.manual_seed(0)
    return perturb(AutoModelForMaskedLM.from_config(AutoConfig.for_model(model_type, **settings)))


def loaded(model_type: str, **options: Any) -> tuple[MaskedLM, PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = small(model_type, **options), tokenizer_of(model_type)
    return mlmfast.load(model, tokenizer), model, tokenizer


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def long_text(tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """A text of so many tokens, special ones included."""
    text = " ".join(["a"] * (tokens - 2))
    assert len(tokenizer(text)["input_ids"]) == tokens
    return text


@pytest.mark.parametrize("model_type", TYPES)
def test_saved_and_live_equal_the_loop(model_type: str, tmp_path: Path) -> None:
    """Texts of different lengths in one request; every metric."""
    live, model, tokenizer = loaded(model_type)
    saved = mlmfast.load(save(tmp_path, model, tokenizer), device="cpu")
    truth = forward_of(model)
    for lm in (live, saved):
        assert lm.family == "generic" and f"generic ({model_type})" in repr(lm)
        assert lm.spec().conduct == generic.Conduct(len(tokenizer), together=True, hooked=True)
        assert_equals_the_loop(lm, truth, tokenizer, [(text, None) for text in TEXTS], ALL_METRICS)
    assert hooks_of(model) == 0
    scores, truths = live.score(TEXTS, ranks=True, entropies=True), [reference_loop(truth, tokenizer, t) for t in TEXTS]
    for score, wanted in zip(scores, truths):
        assert score.generic and repr(score).endswith("generic)")
        assert (score.ranks == wanted.ranks).all()
        assert_near(score.entropies, wanted.entropies)


@pytest.mark.parametrize("model_type", TYPES)
def test_the_last_length_and_one_more(model_type: str) -> None:
    lm, model, tokenizer = loaded(model_type)
    holds = lm.max_length
    assert holds == (64 if model_type == "funnel" else HOLDS)  # whose positions are relative: its tokenizer says
    text = long_text(tokenizer, holds)
    assert_score(lm.score([text], metric="strided")[0], reference_loop(forward_of(model), tokenizer, text, "strided"))
    with pytest.raises(TextError, match=f"{holds + 1}.*{holds}"):
        lm.score([text + " a"])


def test_a_perceiver_gives_a_row_for_every_position_it_has() -> None:
    sizes = {"d_model": 32, "num_latents": 8, "d_latents": 32, "max_position_embeddings": HOLDS}
    lm, model, tokenizer = loaded("perceiver", **sizes)
    texts = [*TEXTS, long_text(tokenizer, HOLDS)]
    assert_equals_the_loop(lm, forward_of(model), tokenizer, [(text, None) for text in texts], ["original", "unmasked"])
    with pytest.raises(TextError, match=f"{HOLDS + 1}.*{HOLDS}"):
        lm.score([long_text(tokenizer, HOLDS + 1)])


def test_rotary_positions_end_nowhere() -> None:
    lm, model, tokenizer = loaded("eurobert", **(BERT | {"num_key_value_heads": 2, "head_dim": 8}))
    assert lm.generic and model.config.max_position_embeddings == HOLDS and lm.max_length is None
    text = long_text(tokenizer, HOLDS + 30)
    assert_score(lm.score([text], metric="strided")[0], reference_loop(forward_of(model), tokenizer, text, "strided"))


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("budget", [1, 40, 4000])
def test_a_score_does_not_depend_on_its_company(model_type: str, budget: int) -> None:
    lm, _, _ = loaded(model_type)
    texts = [*TEXTS, *sentences(6, seed=3)]
    alone = [lm.score([text])[0].logprobs for text in texts]
    lm.batch_tokens = budget
    for one, other in zip(lm.score(texts), alone):
        assert_near(one.logprobs, other, 1e-5)


@pytest.mark.parametrize("model_type", ["megatron-bert", "bart"])
def test_only_scored_rows_pass_the_head(model_type: str) -> None:
    lm, model, tokenizer = loaded(model_type)
    rows: list[int] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda m, x: rows.append(x[0].shape[:-1].numel()))
    score = lm.score([TEXTS[0]])[0]
    handle.remove()
    assert sum(rows) == len(score) < len(tokenizer(TEXTS[0])["input_ids"]) * len(score)


@pytest.mark.parametrize("model_type", ["roberta-prelayernorm", "fnet"])
@pytest.mark.parametrize("options", [{}, {"draft": "masks"}], ids=["plain", "draft"])
def test_greedy_generation_is_the_plain_loop(model_type: str, options: dict[str, Any]) -> None:
    lm, model, tokenizer = loaded(model_type)
    truth = appending(model, tokenizer)
    prompts = ["The cat watches", "A", "Every remarkable lighthouse in the rain"]
    for prompt, found in zip(prompts, lm.generate(prompts, max_new_tokens=6, eos_token_id=[], **options)):
        tokens, logprobs = loop(truth, tokenizer(prompt, add_special_tokens=False)["input_ids"], 6)
        assert found.token_ids.tolist() == tokens and found.generic
        np.testing.assert_allclose(found.logprobs, logprobs, atol=1e-4)
    beams = lm.generate(prompts[0], max_new_tokens=4, num_beams=3, repetition_penalty=1.3)
    assert len(beams) and "generic" in repr(beams)


def test_caches_are_refused_by_name() -> None:
    lm, _, _ = loaded("fnet")
    with pytest.raises(RequestError, match="window.*generic.*cache='none'"):
        lm.generate("The cat", cache="window")
    with pytest.raises(RequestError, match="prefix.*generic.*cache='none'"):
        lm.rank("The cat", [" a", " b"], cache="prefix")
    with pytest.raises(BackendError, match="its own code.*backend='auto'"):
        mlmfast.load(lm.model, lm.tokenizer, backend="reference")


def test_rankings_distributions_and_fills() -> None:
    lm, model, tokenizer = loaded("xlm")
    text = TEXTS[0]
    truth = reference_loop(forward_of(model), tokenizer, text, temperature=1.5)
    whole = lm.distributions([text], top_k=None, temperature=1.5)[0]
    assert_near(whole.logprobs, truth.rows)
    best = lm.distributions([text], top_k=4, temperature=1.5)[0]
    assert (best.candidate_ids == np.argsort(-truth.rows, 1)[:, :4]).all()
    fill = lm.fill(f"The {tokenizer.mask_token} follow.")[0]
    ranking = lm.rank("The cat", [" follow", " watches the dogs"])
    for found in (whole, best, fill, ranking):
        assert found.generic and "generic" in repr(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("model_type", ["megatron-bert", "mobilebert"])
def test_other_dtypes(model_type: str, dtype: torch.dtype) -> None:
    """Twice plain torch's own error, plus 1e-3, as in CONTRIBUTING.md."""
    tokenizer, model = tokenizer_of(model_type), small(model_type).to(dtype)
    score = mlmfast.load(model, tokenizer).score([TEXTS[1]])[0]
    truth = reference_loop(forward_of(model), tokenizer, TEXTS[1])
    with torch.no_grad():
        rows = [
            model(torch.tensor([list(ids)])).logits[0, position].double().log_softmax(-1)[target]
            for ids, position, target in zip(truth.copies, truth.positions, truth.token_ids)
        ]
    own_error = np.abs(torch.stack(rows).numpy() - truth.logprobs).max()
    assert np.abs(score.logprobs - truth.logprobs).max() <= 2 * own_error + 1e-3


@pytest.mark.parametrize("model_type", ["mobilebert", "big_bird", "esm"])
def test_a_model_in_training_is_left_in_training(model_type: str) -> None:
    """Its dropout is off while it scores, part of it stays frozen, and what it keeps does not stop its next step."""
    options = (
        {"position_embedding_type": "rotary", "pad_token_id": 0, "mask_token_id": 4} if model_type == "esm" else {}
    )
    model, tokenizer = small(model_type, hidden_dropout_prob=0.5, **(BERT | options)), tokenizer_of(model_type)
    truth = reference_loop(forward_of(model), tokenizer, TEXTS[0])
    model.train()
    frozen = model.get_input_embeddings()
    frozen.eval()
    before = {name: module.training for name, module in model.named_modules()}
    lm = mlmfast.load(model, tokenizer)
    state = torch.get_rng_state()
    assert_score(lm.score([TEXTS[0]])[0], truth)
    assert torch.equal(torch.get_rng_state(), state) or model_type == "big_bird"  # which makes modules as it goes
    after = {name: module.training for name, module in model.named_modules()}
    assert all(after[name] == before.get(name, True) for name in after) and not frozen.training
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.9)
    assert_score(lm.score([TEXTS[0]])[0], reference_loop(forward_of(model), tokenizer, TEXTS[0]))


def test_hooks_and_mode_are_put_back_when_the_model_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, model, _ = loaded("megatron-bert")
    model.train()

    def fails(*_: object, **__: object) -> Tensor:
        assert hooks_of(model) == 1 and not model.training
        raise IndexError("index out of range in self")

    monkeypatch.setattr(model.cls, "forward", fails)
    with pytest.raises(MLMFastError, match="own code fails on .* tokens.*index out of range"):
        lm.score([TEXTS[0]])
    assert hooks_of(model) == 0 and model.training


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError, MemoryError])
def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch, failure: type[Exception]) -> None:
    lm, model, _ = loaded("roformer")
    wanted = lm.score(TEXTS)
    sizes: list[int] = []
    true_forward = model.roformer.forward

    def little(input_ids: Tensor, **options: Any) -> Any:
        sizes.append(input_ids.numel())
        if input_ids.numel() > 60:
            raise failure("out of memory")
        return true_forward(input_ids=input_ids, **options)

    monkeypatch.setattr(model.roformer, "forward", little)
    for one, other in zip(lm.score(TEXTS), wanted):
        assert_near(one.logprobs, other.logprobs, 1e-5)
    assert max(sizes) > 60


def test_a_large_vocabulary_bounds_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, _, _ = loaded("megatron-bert", vocab_size=250_000)
    assert lm.batch_tokens < 500 and lm.batch_tokens * row_bytes(lm.spec()) <= CPU_BYTES
    lm, _, _ = loaded("megatron-bert")
    assert lm.batch_tokens == 2048
    read: list[int] = []
    true_read = generic.LogitsHead.vocab_logprob

    def watched(head: generic.LogitsHead, logits: Tensor, *rest: Any) -> Any:
        read.append(logits.nbytes)
        return true_read(head, logits, *rest)

    monkeypatch.setattr(generic.LogitsHead, "vocab_logprob", watched)
    monkeypatch.setattr(execution, "READ_BYTES", 3000)
    lm.batch_tokens = 30
    lm.score(TEXTS)
    assert max(read[:-1]) < 3000 + 30 * 4 * lm.vocab_size and min(read[:-1]) >= 3000


@pytest.mark.parametrize("model_type", ["roberta-prelayernorm", "convbert", "mobilebert", "fnet", "luke", "ibert"])
def test_a_missing_head_is_refused(model_type: str, tmp_path: Path) -> None:
    tokenizer, model = tokenizer_of(model_type), small(model_type)
    save(tmp_path / "encoder", model.base_model, tokenizer)
    with pytest.raises(CheckpointError, match="noise.*masked-LM head"):
        mlmfast.load(tmp_path / "encoder")
    folder = save(tmp_path / "part", model, tokenizer)
    weights = load_file(folder / "model.safetensors")
    head = [name for name in weights if not name.startswith(model.base_model_prefix)]
    assert head
    for gone in head:
        kept = {name: weights[name] for name in weights if name != gone}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match="noise.*masked-LM head"):
            mlmfast.load(folder)


@pytest.mark.parametrize("model_type", ["funnel", "bart"])
def test_a_missing_layer_is_refused(model_type: str, tmp_path: Path) -> None:
    folder = save(tmp_path, small(model_type), tokenizer_of(model_type))
    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in weights if "layer" in name and name.startswith(("funnel.", "model.")))
    save_file({n: w for n, w in weights.items() if n != gone}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="incomplete"):
        mlmfast.load(folder)


def test_a_reformer_that_hashes_at_random_is_refused() -> None:
    settings = {"attn_layers": ["lsh", "local"], "axial_pos_embds": False, "hidden_size": 32, "feed_forward_size": 48}
    settings |= {"is_decoder": False, "num_attention_heads": 4, "attention_head_size": 8, "num_buckets": 4}
    model = small("reformer", max_position_embeddings=256, **settings)
    with pytest.raises(UnsupportedModelError, match="change from run to run"):
        mlmfast.load(model, bert_pieces())


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("xmod", ROBERTA | {"languages": ["en"]}, "language"),
        ("nystromformer", {"segment_means_seq_len": 48, "num_landmarks": 8}, "own code fails on"),
        pytest.param("mra", BERT, "do not depend", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA")),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(
    model_type: str, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    model, tokenizer = small(model_type, **options), tokenizer_of(model_type)
    with pytest.raises(UnsupportedModelError, match=reason):
        mlmfast.load(model, tokenizer)
    with pytest.raises(UnsupportedModelError, match=reason):
        mlmfast.load(save(tmp_path, model, tokenizer), device="cpu")


def test_an_xmod_with_a_language_is_served() -> None:
    model = small("xmod", **ROBERTA, languages=["en"], default_language="en")
    lm = mlmfast.load(model, bert_pieces())
    assert_equals_the_loop(lm, forward_of(model), bert_pieces(), [(TEXTS[1], None)], ALL_METRICS)


@pytest.mark.parametrize("model_type", ["wav2vec2", "t5"])
def test_types_without_a_masked_language_model_stay_refused(model_type: str, tmp_path: Path) -> None:
    folder = save(tmp_path, small_bert(len(bert_pieces())), bert_pieces())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    with pytest.raises(UnsupportedModelError, match=f"{model_type}.*bert"):
        mlmfast.load(folder)


def test_a_short_text_does_not_change_a_long_ones_attention() -> None:
    """A BigBird with sparse attention leaves it for good at the first short text."""
    sparse = {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1, "max_position_embeddings": 96}
    model, tokenizer = small("big_bird", **sparse), bert_pieces()
    text = long_text(tokenizer, 64)
    truth = reference_loop(forward_of(model), tokenizer, text, "unmasked")
    lm = mlmfast.load(model, tokenizer)  # whose probe has short sequences
    for _ in range(2):
        assert_score(lm.score(["A"])[0], reference_loop(forward_of(model), tokenizer, "A"))
        assert_score(lm.score([text], metric="unmasked")[0], truth)


class Stranger(nn.Module):
    """A model that transformers does not know, as remote code is: a tiny mixer whose faults can be switched on."""

    def __init__(self, config: BertConfig, fault: str = "") -> None:
        super().__init__()
        self.config = config
        self.base_model = nn.Embedding(config.vocab_size, 16)
        self.head = nn.Linear(16, config.vocab_size)
        self.fault = fault

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        if self.fault == "random":
            return MaskedLMOutput(logits=torch.randn(*input_ids.shape, self.config.vocab_size))
        states = self.base_model(input_ids)
        # The base model's states are not all that the head reads: mixing after them makes the hook wrong.
        states = states + states.mean((0, 1) if self.fault == "company" else 1, keepdim=True)
        logits = self.head(states * torch.arange(1, 1 + states.shape[1])[:, None])
        return logits[:, :-1] if self.fault == "short" else (logits,)


def stranger(fault: str = "") -> Stranger:
    torch.manual_seed(0)
    return Stranger(BertConfig(vocab_size=len(bert_pieces())), fault).eval()


@pytest.mark.parametrize("fault", ["", "company"])
def test_a_stranger_is_probed_and_served(fault: str) -> None:
    """Where the hook or company would change its rows, it does without."""
    model, tokenizer = stranger(fault), bert_pieces()
    lm = mlmfast.load(model, tokenizer)
    assert lm.family == "generic" and lm.spec().conduct == generic.Conduct(len(tokenizer), fault == "", False)
    wanted = copy_of(model)
    assert_equals_the_loop(lm, wanted, tokenizer, [(text, None) for text in TEXTS], ALL_METRICS)


def copy_of(model: Stranger) -> Any:
    @torch.no_grad()
    def forward(ids: list[int]) -> Tensor:
        return model(torch.tensor([ids]))[0][0].double()

    return forward


def test_what_a_model_keeps_of_a_pass_serves_its_training() -> None:
    """Tables that are made when they are first needed must be no inference tensors."""
    model = stranger()
    kept: list[Tensor] = []

    def scaled(module: nn.Module, given: Any, states: Tensor) -> Tensor:
        kept[:] = kept or [torch.full((16,), 2.0)]
        return states * kept[0]

    model.base_model.register_forward_hook(scaled)
    mlmfast.load(model, bert_pieces()).score([TEXTS[0]])
    model(torch.tensor([[5, 6]]))[0].sum().backward()


@pytest.mark.parametrize(("fault", "reason"), [("random", "run to run"), ("short", "not one row a token")])
def test_a_stranger_that_cannot_be_scored_is_refused(fault: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        mlmfast.load(stranger(fault), bert_pieces())


@pytest.mark.parametrize("conduct", [{"hooked": True}, {"together": True}], ids=str)
def test_what_the_probe_forbids_would_be_wrong(monkeypatch: pytest.MonkeyPatch, conduct: dict[str, bool]) -> None:
    """The planted faults that it stands against: without it, the test above fails."""
    model, tokenizer = stranger("company"), bert_pieces()
    honest = generic.probe
    settings = {"together": False, "hooked": False} | conduct
    monkeypatch.setattr(generic, "probe", lambda *args: generic.Conduct(honest(*args).vocab_size, **settings))
    lm = mlmfast.load(model, tokenizer)
    with pytest.raises((AssertionError, MLMFastError)):
        assert_equals_the_loop(lm, copy_of(model), tokenizer, [(text, None) for text in TEXTS], ["original"])


def test_another_threads_pass_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, model, tokenizer = loaded("megatron-bert")
    ids = torch.tensor([tokenizer(TEXTS[1])["input_ids"]])
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    found: list[Tensor] = []
    true_head = model.cls.forward

    def meanwhile(states: Tensor) -> Tensor:
        monkeypatch.undo()
        thread = threading.Thread(target=lambda: found.append(model(input_ids=ids).logits.detach()))
        thread.start()
        thread.join()
        return true_head(states)

    monkeypatch.setattr(model.cls, "forward", meanwhile)
    lm.score([TEXTS[0]])
    assert torch.equal(found[0], wanted)


def test_a_familys_class_with_another_forward_is_generic() -> None:
    class Doubled(BertForMaskedLM):
        def forward(self, *args: Any, **options: Any) -> Any:
            output = super().forward(*args, **options)
            output.logits = output.logits * 2
            return output

    class Same(BertForMaskedLM):
        pass

    tokenizer = bert_pieces()
    config = small_bert(len(tokenizer)).config
    model = perturb(Doubled(config))
    with pytest.warns(UserWarning, match="Doubled.*own code computes it"):
        lm = mlmfast.load(model, tokenizer)
    assert lm.generic
    assert_score(lm.score([TEXTS[0]])[0], reference_loop(forward_of(model), tokenizer, TEXTS[0]))
    assert mlmfast.load(perturb(Same(config)), tokenizer).family == "bert"


def test_an_activation_that_the_config_does_not_name_is_generic() -> None:
    """Families read its name in the config."""
    tokenizer = bert_pieces()
    model = small_bert(len(tokenizer))
    model.bert.encoder.layer[1].intermediate.intermediate_act_fn = torch.nn.ReLU()
    with pytest.warns(UserWarning, match=r"layer.1.*\(ReLU\) is an activation.*own code computes it"):
        lm = mlmfast.load(model, tokenizer)
    assert_score(lm.score([TEXTS[0]])[0], reference_loop(forward_of(model), tokenizer, TEXTS[0]))


def test_a_vocabulary_that_grows_is_seen() -> None:
    model, tokenizer = small("megatron-bert"), copy.deepcopy(bert_pieces())
    lm = mlmfast.load(model, tokenizer)
    tokenizer.add_tokens(["zzz"])
    model.resize_token_embeddings(len(tokenizer))
    assert lm.vocab_size == len(tokenizer)
    assert_score(lm.score(["zzz"])[0], reference_loop(forward_of(model), tokenizer, "zzz"))


def test_doctor_and_the_command_line_say_generic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    findings = doctor.examine()
    assert "fnet" in findings["generic"] and not set(findings["generic"]) & set(findings["families"])
    doctor.show(findings)
    assert "own code" in " ".join(capsys.readouterr().out.split())
    folder = save(tmp_path / "fnet", small("fnet"), bert_pieces())
    bert = save(tmp_path / "bert", small_bert(len(bert_pieces())), bert_pieces())
    (tmp_path / "rows.txt").write_text("The cat.\n")
    for model, marked in ((folder, True), (bert, False)):
        for command in (["score", str(tmp_path / "rows.txt")], ["rank", "The", " cat", " dogs"], ["generate", "The"]):
            result = CliRunner().invoke(cli.app, [*command, "--model", str(model), "--device", "cpu"])
            assert result.exit_code == 0, result.output
            assert json.loads(result.stdout).get("generic", False) == marked
