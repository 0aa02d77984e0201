"""attention: packed, bidirectional, all rows or a few as queries, with a local window, a distance bias, or neither."""

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
from mlmfast.reference import accumulation
from mlmfast.reference import attention as reference_module


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    q_positions: Tensor | None,
    scale: float,
    local_window: int = -1,
    distance_bias: Tensor | None = None,
) -> Tensor:
    """One sequence, head and query after the other."""
    out = torch.zeros_like(q)
    for s in range(len(cu_seqlens_q) - 1):
        keys = range(int(cu_seqlens_k[s]), int(cu_seqlens_k[s + 1]))
        for row in range(int(cu_seqlens_q[s]), int(cu_seqlens_q[s + 1])):
            place = row - int(cu_seqlens_q[s]) if q_positions is None else int(q_positions[row])
            seen = [r for j, r in enumerate(keys) if local_window < 0 or abs(place - j) <= local_window]
            scores = (k[seen] * q[row]).sum(-1) * scale  # [keys, H]
            if distance_bias is not None:
                longest = distance_bias.shape[1] // 2
                distances = [max(-longest, min(longest, place - (r - keys[0]))) for r in seen]
                scores = scores + distance_bias.T[[d + longest for d in distances]]
            weights = torch.softmax(scores, dim=0)
            out[row] = (weights[:, :, None] * v[seen]).sum(0)
    return out


def few_queries(lengths: list[int], seed: int = 0) -> tuple[list[int], Tensor]:
    """How many rows of each sequence ask (sometimes none), and their places, ascending within a sequence."""
    generator = torch.Generator().manual_seed(seed)
    counts, places = [], []
    for s, length in enumerate(lengths):
        count = 0 if s == 1 else int(torch.randint(0 if s else 1, min(length, 5) + 1, (1,), generator=generator))
        counts.append(count)
        places.append(torch.randperm(length, generator=generator)[:count].sort().values)
    return counts, torch.cat(places)


def arguments(lengths: list[int], heads: int, width: int, few: bool, window: int = -1) -> list[Any]:
    rows = sum(lengths)
    k, v = randn(rows, heads, width, seed=1), randn(rows, heads, width, seed=2)
    counts, places = few_queries(lengths) if few else (lengths, None)
    q = randn(sum(counts), heads, width, seed=3)
    return [q, k, v, bounds(counts), bounds(lengths), max(counts), max(lengths), places, 0.7 * width**-0.5, window]


def biased(q: Tensor, *rest: Any) -> Tensor:
    """The op, given its bias in the dtype that it takes."""
    return attention(q, *rest[:-1], rest[-1].to(accumulation(q.dtype)))


def biased_arguments(
    lengths: list[int], heads: int, width: int, few: bool, window: int = -1, reach: int = 20
) -> list[Any]:
    """The bias of each head and distance is its own, and as strong as the scores."""
    return [*arguments(lengths, heads, width, few, window), 2 * randn(heads, 2 * reach + 1, seed=4)]


@on_every_backend
@pytest.mark.parametrize("few", [False, True], ids=["all rows", "few queries"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_attention(backend: Backend, dtype: torch.dtype, lengths: list[int], few: bool) -> None:
    assert_as_good_as_torch(backend, dtype, attention, plain, arguments(lengths, 3, 8, few))


@on_every_backend
@pytest.mark.parametrize("window", [0, 1, 5, 64])
@pytest.mark.parametrize("few", [False, True], ids=["all rows", "few queries"])
def test_local_window(backend: Backend, dtype: torch.dtype, window: int, few: bool) -> None:
    assert_as_good_as_torch(backend, dtype, attention, plain, arguments([1, 17, 33, 70], 2, 4, few, window))


@on_every_backend
@pytest.mark.parametrize("few", [False, True], ids=["all rows", "few queries"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_distance_bias(backend: Backend, dtype: torch.dtype, lengths: list[int], few: bool) -> None:
    assert_as_good_as_torch(backend, dtype, biased, plain, biased_arguments(lengths, 3, 8, few))


@on_every_backend
@pytest.mark.parametrize("window", [0, 1, 5, 64])
@pytest.mark.parametrize("few", [False, True], ids=["all rows", "few queries"])
def test_distance_bias_in_a_local_window(backend: Backend, dtype: torch.dtype, window: int, few: bool) -> None:
    assert_as_good_as_torch(backend, dtype, biased, plain, biased_arguments([1, 17, 33, 70], 2, 4, few, window))


@on_every_backend_in_float32
@pytest.mark.parametrize("reach", [0, 1, 15, 68, 69, 70, 300])
def test_reach_of_a_distance_bias(backend: Backend, reach: int) -> None:
    """Farther distances share the end columns; a bias may reach farther than any sequence."""
    assert_as_good_as_torch(backend, torch.float32, biased, plain, biased_arguments([70, 2], 2, 4, False, reach=reach))


@on_every_backend_in_float32
@pytest.mark.parametrize("scale", [0.0, 1e-40, 30.0])
def test_a_distance_bias_is_added_after_the_scale(backend: Backend, scale: float) -> None:
    given = biased_arguments([40, 5], 2, 4, False)
    given[8] = scale
    assert_as_good_as_torch(backend, torch.float32, biased, plain, given)


@on_every_backend_in_float32
@pytest.mark.parametrize(("heads", "width"), [(1, 1), (1, 64), (5, 3), (12, 16), (2, 80)])
def test_heads_and_widths(backend: Backend, heads: int, width: int) -> None:
    assert_as_good_as_torch(backend, torch.float32, attention, plain, arguments([7, 1, 12], heads, width, False))


@on_every_backend
def test_places_in_no_order(backend: Backend, dtype: torch.dtype) -> None:
    """Queries may stand in any order, and one place may ask twice."""
    given = arguments([40, 39], 2, 4, False)
    places = torch.tensor([20, 3, 3, 0, 39, 17, 17, 16, 38, 0])
    given[0] = randn(10, *given[0].shape[1:], seed=8)
    given[3], given[5], given[7] = bounds([8, 2]), 8, places
    assert_as_good_as_torch(backend, dtype, attention, plain, given)
    for window in (-1, 9):
        biases = [window, 2 * randn(2, 31, seed=4)]
        assert_as_good_as_torch(backend, dtype, biased, plain, [*given[:9], *biases])


@on_every_backend_in_float32
@pytest.mark.parametrize("threads", [1, 3])
def test_more_queries_than_one_thread_takes(backend: Backend, threads: int) -> None:
    given = arguments([300, 20], 2, 4, False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_as_good_as_torch(backend, torch.float32, attention, plain, given)
    finally:
        torch.set_num_threads(before)


@on_every_backend_in_float32
@pytest.mark.parametrize("window", [3, 100, 299, 2**63 - 1])
@pytest.mark.parametrize("few", [False, True], ids=["all rows", "few queries"])
def test_windows_of_long_sequences(backend: Backend, window: int, few: bool) -> None:
    given = arguments([300, 7, 290], 1, 4, few, window)
    assert_as_good_as_torch(backend, torch.float32, attention, plain, given)
    assert_as_good_as_torch(backend, torch.float32, biased, plain, [*given, 2 * randn(1, 241, seed=4)])


@on_every_backend
@pytest.mark.parametrize("width", [3, 33, 64, 80])
def test_widths_in_every_dtype(backend: Backend, dtype: torch.dtype, width: int) -> None:
    assert_as_good_as_torch(backend, dtype, attention, plain, arguments([17, 33, 40], 2, width, False))


@on_every_backend_in_float32
def test_heads_that_are_not_contiguous(backend: Backend) -> None:
    given = moved(arguments([5, 3], 2, 4, False), backend, torch.float32)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given[:3]]
    with serving(backend):
        torch.testing.assert_close(attention(*turned, *given[3:]), attention(*given), rtol=0, atol=1e-6)


@on_every_cpu_path
def test_bounds_and_places_are_checked(backend: Backend) -> None:
    given = moved(arguments([5, 3], 2, 4, True), backend, torch.float32)
    wrong = {
        "cu_seqlens_q is out of order": (3, torch.tensor([0, 9, 4], dtype=torch.int32)),
        "cu_seqlens_k is out of order": (4, torch.tensor([0, 5, 9], dtype=torch.int32)),
        "must be int32": (4, torch.tensor([0, 5, 8])),
        "q_positions leaves its sequence": (7, torch.full((len(given[0]),), 5)),
        "a place a query": (7, given[7][:1]),
        "agree in heads and width": (1, given[1][:, :1]),
        "another dtype": (2, given[2].bfloat16()),
    }
    for message, (place, value) in wrong.items():
        with serving(backend), pytest.raises(RuntimeError, match=message):
            attention(*given[:place], value, *given[place + 1 :])


@on_every_cpu_path
def test_a_distance_bias_is_checked(backend: Backend) -> None:
    *given, bias = moved(biased_arguments([5, 3], 2, 4, True, reach=3), backend, torch.float32)
    wrong = {
        "distance_bias must be float32": bias.double(),
        r"distance_bias must be contiguous \[heads, distances\]": bias[:1],
        "reaching as far to both sides": bias[:, 1:],
        r"\[heads, distances\]": bias[0],
    }
    for message, value in wrong.items():
        with serving(backend), pytest.raises(RuntimeError, match=message):
            attention(*given, value)
    for place, value, message in (
        (6, 0, "max_seqlen_k must be positive"),
        (7, given[7] + 5, "q_positions leaves its sequence"),
        (7, given[7][:1], "a place a query"),
    ):
        with serving(backend), pytest.raises(RuntimeError, match=message):
            attention(*given[:place], value, *given[place + 1 :], bias)
    given = moved(biased_arguments([5, 3], 2, 4, False, reach=3), backend, torch.float32)
    with serving(backend), pytest.raises(RuntimeError, match="a sequence is longer than max_seqlen_k"):
        attention(*given[:6], 4, *given[7:])


@on_every_backend
def test_no_queries_at_all(backend: Backend, dtype: torch.dtype) -> None:
    q, k, v, _, cu_k, _, longest, _, scale, _ = moved(arguments([3, 4], 2, 4, False), backend, dtype)
    with serving(backend):
        none = torch.zeros(3, dtype=torch.int32, device=backend.device)
        places = torch.zeros(0, dtype=torch.int64, device=backend.device)
        for bias in (None, torch.ones(2, 5, dtype=accumulation(dtype), device=backend.device)):
            out = attention(q[:0], k, v, none, cu_k, 0, longest, places, scale, distance_bias=bias)
            assert out.shape == (0, 2, 4) and out.dtype == dtype


@on_every_backend
def test_strong_scores_do_not_overflow(backend: Backend, dtype: torch.dtype) -> None:
    given = arguments([9, 2], 2, 4, False)
    given[0] = given[0] * 30
    given[1] = given[1] * 30
    assert_as_good_as_torch(backend, dtype, attention, plain, given)
    assert_as_good_as_torch(backend, dtype, biased, plain, [*given, 300 * randn(2, 9, seed=4)])


@on_every_backend_in_float32
def test_slices_of_one_projection(backend: Backend) -> None:
    """Queries, keys and values that lie side by side in one tensor."""
    given = moved(arguments([5, 3], 2, 4, False), backend, torch.float32)
    together = torch.stack(given[:3], dim=1)  # [T, 3, H, D]
    with serving(backend):
        views = attention(together[:, 0], together[:, 1], together[:, 2], *given[3:])
        whole = attention(*given)
    assert not together[:, 0].is_contiguous()
    torch.testing.assert_close(views, whole, rtol=0, atol=1e-6)


@on_every_backend_in_float32
@pytest.mark.parametrize("few", [False, True])
def test_registration(backend: Backend, few: bool) -> None:
    check_registration(backend, attention, arguments([4, 1, 6], 2, 4, few))
    check_registration(backend, attention, arguments([4, 1, 6], 2, 4, few, window=2))
    check_registration(backend, attention, biased_arguments([4, 1, 6], 2, 4, few, window=2, reach=3))


def test_the_reference_computes_blocks_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound on the scores held at once splits equal lengths into several blocks, down to one sequence."""
    given = biased_arguments([6, 6, 6, 6, 2, 2, 2], 2, 4, False, reach=3)
    whole = reference_module.attention(*given)
    for most in (1, 80, 150):
        monkeypatch.setattr(reference_module, "SCORES", most)
        torch.testing.assert_close(reference_module.attention(*given), whole, rtol=0, atol=1e-12)
