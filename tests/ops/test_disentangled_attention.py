"""disentangled_attention: attention with DeBERTa's two position terms, each alone and both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import (
    LENGTHS,
    Backend,
    assert_as_good_as_torch,
    bounds,
    check_registration,
    moved,
    on_every_backend,
    on_every_backend_in_float32,
    on_every_cpu_path,
    randn,
    serving,
)
from torch import Tensor

from mlmfast.ops.attention import attention
from mlmfast.ops.disentangled_attention import disentangled_attention
from mlmfast.reference import attention as reference_module
from mlmfast.reference.disentangled_attention import disentangled_attention as reference


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    buckets: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    q_positions: Tensor | None,
    scale: float,
) -> Tensor:
    """One sequence and query after the other, the table row of each key looked up by itself."""
    out = torch.zeros_like(q)
    longest = len(buckets) // 2
    for s in range(len(cu_seqlens_q) - 1):
        keys = slice(int(cu_seqlens_k[s]), int(cu_seqlens_k[s + 1]))
        for row in range(int(cu_seqlens_q[s]), int(cu_seqlens_q[s + 1])):
            place = row - int(cu_seqlens_q[s]) if q_positions is None else int(q_positions[row])
            distances = [max(-longest, min(longest, place - j)) for j in range(keys.stop - keys.start)]
            table_rows = [int(buckets[d + longest]) for d in distances]
            scores = (k[keys] * q[row]).sum(-1)  # [keys, H]
            if pos_key is not None:
                scores = scores + (pos_key[table_rows] * q[row]).sum(-1)
            if pos_query is not None:
                scores = scores + (pos_query[table_rows] * k[keys]).sum(-1)
            weights = torch.softmax(scores * scale, dim=0)
            out[row] = (weights[:, :, None] * v[keys]).sum(0)
    return out


def few_queries(lengths: list[int]) -> tuple[list[int], Tensor]:
    """The first, a middle and the last row of each sequence but the second, which asks nothing."""
    places = [sorted({0, length // 2, length - 1}) if s != 1 else [] for s, length in enumerate(lengths)]
    return [len(p) for p in places], torch.tensor([place for own in places for place in own])


def arguments(
    lengths: list[int], few: bool, terms: str = "c2p p2c", heads: int = 3, width: int = 8, reach: int = 20
) -> list[Any]:
    """Buckets in no order at all, so that a formula instead of the table, or a swapped sign, shows."""
    rows, table = sum(lengths), 14
    k, v = randn(rows, heads, width, seed=1), randn(rows, heads, width, seed=2)
    counts, places = few_queries(lengths) if few else (lengths, None)
    generator = torch.Generator().manual_seed(4)
    return [
        randn(sum(counts), heads, width, seed=3),
        k,
        v,
        randn(table, heads, width, seed=5) if "c2p" in terms else None,
        randn(table, heads, width, seed=6) if "p2c" in terms else None,
        torch.randint(0, table, (2 * reach + 1,), generator=generator).to(torch.int32),
        bounds(counts),
        bounds(lengths),
        max(counts),
        max(lengths),
        places,
        0.6 * width**-0.5,
    ]


@on_every_backend
@pytest.mark.parametrize("few", [False, True], ids=["all rows", "few queries"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_disentangled_attention(backend: Backend, dtype: torch.dtype, lengths: list[int], few: bool) -> None:
    assert_as_good_as_torch(backend, dtype, disentangled_attention, plain, arguments(lengths, few))


@on_every_backend
@pytest.mark.parametrize("few", [False, True], ids=["all rows", "few queries"])
@pytest.mark.parametrize("terms", ["c2p", "p2c", ""])
def test_each_term_alone(backend: Backend, dtype: torch.dtype, terms: str, few: bool) -> None:
    assert_as_good_as_torch(backend, dtype, disentangled_attention, plain, arguments([19, 4, 45], few, terms))


@on_every_backend_in_float32
@pytest.mark.parametrize("reach", [0, 1, 7, 63, 200])
def test_reach_of_the_bucket_table(backend: Backend, reach: int) -> None:
    """Farther distances share the ends, whether the table is shorter or longer than the text."""
    given = arguments([64, 3], False, reach=reach)
    assert_as_good_as_torch(backend, torch.float32, disentangled_attention, plain, given)


@on_every_backend_in_float32
@pytest.mark.parametrize(("heads", "width"), [(1, 1), (1, 64), (5, 3), (2, 80)])
def test_heads_and_widths(backend: Backend, heads: int, width: int) -> None:
    given = arguments([7, 1, 12], False, heads=heads, width=width)
    assert_as_good_as_torch(backend, torch.float32, disentangled_attention, plain, given)


@on_every_backend_in_float32
def test_without_tables_it_is_attention(backend: Backend) -> None:
    given = moved(arguments([9, 5, 2], True, terms=""), backend, torch.float32)
    with serving(backend):
        ours, theirs = disentangled_attention(*given), attention(*given[:3], *given[6:])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@on_every_backend
def test_places_in_no_order(backend: Backend, dtype: torch.dtype) -> None:
    """Queries may stand in any order, and one place may ask twice."""
    given = arguments([40, 39], False)
    places = torch.tensor([20, 3, 3, 0, 39, 17, 17, 16, 38, 0])
    given[0] = randn(10, *given[0].shape[1:], seed=8)
    given[6], given[8], given[10] = bounds([8, 2]), 8, places
    assert_as_good_as_torch(backend, dtype, disentangled_attention, plain, given)


@on_every_backend_in_float32
@pytest.mark.parametrize("threads", [1, 3])
def test_more_queries_than_one_thread_takes(backend: Backend, threads: int) -> None:
    given = arguments([300, 20], False, heads=2, width=4)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_as_good_as_torch(backend, torch.float32, disentangled_attention, plain, given)
    finally:
        torch.set_num_threads(before)


@on_every_backend
@pytest.mark.parametrize("width", [3, 33, 64, 80])
def test_widths_in_every_dtype(backend: Backend, dtype: torch.dtype, width: int) -> None:
    given = arguments([17, 33, 40], False, heads=2, width=width)
    assert_as_good_as_torch(backend, dtype, disentangled_attention, plain, given)


@on_every_cpu_path
def test_lengths_and_tables_are_checked(backend: Backend) -> None:
    given = moved(arguments([5, 3], False), backend, torch.float32)
    wrong = {
        "longer than max_seqlen_k": (9, 4),
        "max_seqlen_k must be positive": (9, 0),
        "a row that the position table lacks": (5, torch.full((41,), 14, dtype=torch.int32)),
        "as far to both sides": (5, given[5][:-1]),
        "position tables must be": (3, given[3][:, :1]),
    }
    for message, (place, value) in wrong.items():
        with serving(backend), pytest.raises(RuntimeError, match="disentangled_attention: .*" + message):
            disentangled_attention(*given[:place], value, *given[place + 1 :])


@on_every_backend
def test_no_queries_at_all(backend: Backend, dtype: torch.dtype) -> None:
    given = moved(arguments([3, 4], False), backend, dtype)
    none = torch.zeros(3, dtype=torch.int32, device=backend.device)
    places = torch.zeros(0, dtype=torch.int64, device=backend.device)
    with serving(backend):
        out = disentangled_attention(given[0][:0], *given[1:6], none, given[7], 0, given[9], places, given[11])
    assert out.shape == (0, 3, 8) and out.dtype == dtype


@on_every_backend_in_float32
@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("terms", ["c2p p2c", "c2p", "p2c"])
def test_registration(backend: Backend, few: bool, terms: str) -> None:
    check_registration(backend, disentangled_attention, arguments([4, 1, 6], few, terms))


def test_the_reference_computes_blocks_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments([6, 6, 6, 6, 2, 2, 2], False)
    whole = reference(*given)
    for most in (1, 80, 250):
        monkeypatch.setattr(reference_module, "SCORES", most)
        torch.testing.assert_close(reference(*given), whole, rtol=0, atol=1e-12)
