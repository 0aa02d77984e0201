"""vocab_logprob: log-probabilities, ranks and entropies at given tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import (
    Backend,
    assert_as_good_as_torch,
    check_registration,
    moved,
    on_every_backend,
    on_every_backend_in_float32,
    on_every_cpu_path,
    randn,
    serving,
)
from torch import Tensor

from mlmfast.cpu import vocab_logprob as cpu_module
from mlmfast.cpu import vocab_tiles
from mlmfast.ops.vocab_logprob import vocab_logprob
from mlmfast.reference import vocab_rows as reference_module

SHAPES = [
    (1, 1, 1, 1),
    (1, 5, 17, 1),
    (5, 33, 257, 9),
    (2, 15, 15, 3),
    (2, 16, 16, 3),
    (2, 17, 65, 3),
    (64, 16, 130, 64),
    (3, 768, 1000, 5),
    (3, 8, 1031, 200),
    (7, 8, 64, 0),
    (0, 8, 64, 0),
]


def plain(
    hidden: Tensor,
    vocabulary: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    target_rows: Tensor,
    temperature: float = 1.0,
    ranks: bool = False,
    entropies: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Whole rows, one after the other."""
    logits = (hidden @ vocabulary.T + (0 if bias is None else bias)) / temperature
    rows = logits - torch.logsumexp(logits, dim=1, keepdim=True)
    logprobs = rows[target_rows, targets]
    better = [int((rows[r] > rows[r, t]).sum()) + 1 for t, r in zip(targets.tolist(), target_rows.tolist())]
    spread = -(rows.exp() * rows).sum(1)
    return logprobs, torch.tensor(better if ranks else [], dtype=torch.int64), spread if entropies else spread[:0]


def arguments(
    rows: int, width: int, vocabulary: int, count: int, bias: bool = True, sharpness: float = 2.0
) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [
        randn(rows, width, seed=1),
        sharpness * randn(vocabulary, width, seed=2) / width**0.5,
        randn(vocabulary, seed=3) if bias else None,
        torch.randint(0, vocabulary, (count,), generator=generator),
        torch.randint(0, max(rows, 1), (count,), generator=generator),  # shared rows, in no order
    ]


@on_every_backend
@pytest.mark.parametrize("extras", [False, True], ids=["", "ranks and entropies"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_vocab_logprob(backend: Backend, dtype: torch.dtype, shape: tuple[int, int, int, int], extras: bool) -> None:
    given = arguments(*shape, bias=shape[0] != 5)
    assert_as_good_as_torch(backend, dtype, vocab_logprob, plain, given, ranks=extras, entropies=extras)


@on_every_backend
@pytest.mark.parametrize("temperature", [0.3, 1.7])
def test_temperature(backend: Backend, dtype: torch.dtype, temperature: float) -> None:
    given = [*arguments(5, 12, 99, 11), temperature]
    assert_as_good_as_torch(backend, dtype, vocab_logprob, plain, given, entropies=True)


@on_every_backend
def test_the_sums_are_in_float32(backend: Backend, dtype: torch.dtype) -> None:
    given = moved(arguments(3, 8, 64, 4), backend, dtype)
    with serving(backend):
        logprobs, ranks, entropies = vocab_logprob(*given, ranks=True, entropies=True)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert (logprobs.dtype, ranks.dtype, entropies.dtype) == (wanted, torch.int64, wanted)
    assert (len(logprobs), len(ranks), len(entropies)) == (4, 4, 3)


@on_every_backend_in_float32
def test_what_is_not_asked_for_is_empty(backend: Backend) -> None:
    given = moved(arguments(3, 8, 64, 4), backend, torch.float32)
    with serving(backend):
        assert [len(t) for t in vocab_logprob(*given)] == [4, 0, 0]
        assert [len(t) for t in vocab_logprob(*given, ranks=True)] == [4, 4, 0]
        assert [len(t) for t in vocab_logprob(*given, entropies=True)] == [4, 0, 3]


@on_every_backend_in_float32
@pytest.mark.parametrize("sharpness", [50.0, 3000.0])
def test_one_sided_distributions(backend: Backend, sharpness: float) -> None:
    """Probabilities that underflow add nothing to an entropy, and the logarithm of one is still exact."""
    given = arguments(6, 8, 50, 20, sharpness=sharpness)
    assert_as_good_as_torch(backend, torch.float32, vocab_logprob, underflowing, given, ranks=True, entropies=True)


def underflowing(*given: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    logprobs, ranks, spread = plain(*given, **options)
    hidden, vocabulary, bias = given[:3]
    logits = (hidden @ vocabulary.T + bias) / (given[5] if len(given) > 5 else 1)
    return logprobs, ranks, torch.special.entr(torch.softmax(logits, dim=1)).sum(1) if len(spread) else spread


@on_every_backend_in_float32
def test_ranks(backend: Backend) -> None:
    check_ranks(backend)


def check_ranks(backend: Backend) -> None:
    """Whole numbers, so that every backend finds the same ties: a rank counts what is strictly better."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randint(-2, 3, (9, 4), generator=generator).double()
    vocabulary = torch.randint(-2, 3, (40, 4), generator=generator).double()
    targets = torch.arange(40).repeat(9)
    rows = torch.arange(9).repeat_interleave(40)
    given = moved([hidden, vocabulary, None, targets, rows], backend, torch.float32)
    with serving(backend):
        ranks = vocab_logprob(*given, ranks=True)[1].cpu().view(9, 40)
    scores = hidden @ vocabulary.T
    for r in range(9):
        for t in range(40):
            assert int(ranks[r, t]) == 1 + sum(bool(s > scores[r, t]) for s in scores[r])
    assert len(set(ranks[0].tolist())) < 40  # there were ties


@on_every_backend_in_float32
def test_a_row_does_not_depend_on_the_others(backend: Backend) -> None:
    hidden, vocabulary, bias, _, _ = moved(arguments(33, 16, 200, 0), backend, torch.float32)
    targets = torch.arange(33, device=backend.device)
    with serving(backend):
        together = vocab_logprob(hidden, vocabulary, bias, targets, targets)[0]
        alone = [
            vocab_logprob(hidden[i : i + 1], vocabulary, bias, targets[i : i + 1], targets[:1])[0] for i in range(33)
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=1e-6)


@on_every_backend_in_float32
def test_one_target_many_times(backend: Backend) -> None:
    given = arguments(3, 8, 50, 400)
    given[3], given[4] = torch.full((400,), 49), torch.full((400,), 1)
    assert_as_good_as_torch(backend, torch.float32, vocab_logprob, plain, given, ranks=True)
    with serving(backend):
        logprobs, ranks, _ = vocab_logprob(*moved(given, backend, torch.float32), ranks=True)
    assert len(logprobs.unique()) == len(ranks.unique()) == 1


@on_every_backend_in_float32
def test_impossible_tokens(backend: Backend) -> None:
    """A bias of -inf forbids a token, the first ones too; the others share the probability."""
    given = arguments(4, 8, 300, 12)
    given[2][:270] = -torch.inf
    given[3] = 270 + given[3] % 30
    assert_as_good_as_torch(backend, torch.float32, vocab_logprob, underflowing, given, ranks=True, entropies=True)
    given[3] = torch.zeros(12, dtype=torch.int64)
    with serving(backend):
        logprobs, ranks, _ = vocab_logprob(*moved(given, backend, torch.float32), ranks=True)
    assert bool((logprobs == -torch.inf).all()) and ranks.tolist() == [31] * 12


@on_every_cpu_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "rows", "logits"), [(1, 64, 1 << 24), (16, 1, 1), (17, 4, 900), (64, 3, 1 << 24)])
def test_tiles(
    backend: Backend, dtype: torch.dtype, tokens: int, rows: int, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of any number of tokens and rows: a target finds its tile, and its rank counts those before and after."""
    monkeypatch.setattr(vocab_tiles, "TOKENS", tokens)
    monkeypatch.setattr(cpu_module, "ROWS", rows)
    monkeypatch.setattr(cpu_module, "LOGITS", logits)
    given = arguments(10, 8, 131, 70)
    given[2][:40] = -torch.inf  # whole tiles
    given[3] = 40 + given[3] % 91
    for temperature in (1.0, 0.6):
        assert_as_good_as_torch(
            backend, dtype, vocab_logprob, underflowing, [*given, temperature], ranks=True, entropies=True
        )
    check_ranks(backend)


@on_every_cpu_path
@pytest.mark.parametrize(("place", "name"), [(3, "targets"), (4, "target_rows")])
@pytest.mark.parametrize("bad", [-1, 64, 1 << 40], ids=str)
def test_targets_out_of_range(backend: Backend, place: int, name: str, bad: int) -> None:
    given = moved(arguments(3, 8, 64, 4), backend, torch.float32)
    given[place][2] = bad
    with serving(backend), pytest.raises(IndexError, match=rf"{name} must be in \[0, {64 if place == 3 else 3}\)"):
        vocab_logprob(*given, ranks=True)


@on_every_cpu_path
def test_a_broken_model_is_not_a_number(backend: Backend) -> None:
    hidden, vocabulary, bias, _, _ = moved(arguments(3, 8, 100, 0), backend, torch.float32)
    hidden[1, 2] = torch.nan
    rows = torch.arange(3)
    with serving(backend):
        logprobs, _, spread = vocab_logprob(hidden, vocabulary, bias, rows, rows, entropies=True)
    assert logprobs.isnan().tolist() == spread.isnan().tolist() == [False, True, False]


@on_every_backend_in_float32
@pytest.mark.parametrize("extras", [False, True])
def test_registration(backend: Backend, extras: bool) -> None:
    for bias in (True, False):
        given = arguments(3, 8, 20, 5, bias)
        check_registration(backend, vocab_logprob, given, temperature=0.7, ranks=extras, entropies=extras)


def test_the_reference_works_in_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets in no order find their chunk, whichever rows it holds."""
    given = moved(arguments(10, 8, 50, 40), Backend("reference", "cpu"), torch.float64)
    with serving(Backend("reference", "cpu")):
        whole = vocab_logprob(*given, ranks=True, entropies=True)
        for logits in (1, 100, 170, 499):
            monkeypatch.setattr(reference_module, "LOGITS", logits)
            for a, b in zip(vocab_logprob(*given, ranks=True, entropies=True), whole):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
