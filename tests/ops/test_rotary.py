"""rotary: the first elements of each head turned by their row's position."""

from __future__ import annotations

import inspect
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
from transformers.models.esm import modeling_esm
from transformers.models.modernbert import modeling_modernbert

from mlmfast.ops.rotary import rotary

# rows, heads, width of a head, half of what is rotated of it
SHAPES = [
    (1, 1, 2, 1),
    (1, 3, 16, 8),
    (2, 1, 7, 2),
    (3, 2, 9, 4),
    (13, 5, 30, 15),
    (5, 3, 32, 16),
    (2, 2, 35, 17),
    (11, 2, 63, 31),
    (7, 3, 65, 32),
    (2, 2, 97, 33),
    (17, 2, 64, 5),
    (70, 12, 64, 32),
    (131, 20, 24, 12),
    (3, 1, 200, 65),
    (3, 2, 5, 0),
    (0, 2, 16, 8),
]


def plain(x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
    """The paper's matrix of two by two on every pair."""
    half = cos.shape[1]
    matrices = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)[position_ids]
    pairs = torch.stack([x[..., :half], x[..., half : 2 * half]], -1)  # [T, H, half, 2]
    turned = (matrices[:, None] * pairs[..., None, :]).sum(-1)
    return torch.cat([turned[..., 0], turned[..., 1], x[..., 2 * half :]], -1)


def arguments(rows: int, heads: int, width: int, half: int, positions: int = 37) -> list[Any]:
    """Positions in no order, some of them repeated."""
    steps = 10000.0 ** -(torch.arange(half, dtype=torch.float64) / max(1, half))
    angles = torch.arange(positions)[:, None] * steps
    ids = torch.randint(0, positions, (rows,), generator=torch.Generator().manual_seed(rows))
    return [randn(rows, heads, width, seed=1), angles.cos(), angles.sin(), ids]


@on_every_backend
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rotary(backend: Backend, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    assert_as_good_as_torch(backend, dtype, rotary, plain, arguments(*shape))


@on_every_backend
@pytest.mark.parametrize("half", [1, 4, 12, 23])
def test_the_rest_of_a_head_passes_unchanged(backend: Backend, dtype: torch.dtype, half: int) -> None:
    x, cos, sin, ids = moved(arguments(5, 3, 47, half), backend, dtype)
    with serving(backend):
        got = rotary(x, cos, sin, ids)
    assert torch.equal(got[..., 2 * half :], x[..., 2 * half :])


@on_every_backend
def test_float32_tables(backend: Backend, dtype: torch.dtype) -> None:
    """They are not rounded to the dtype of ``x``: only the result is."""
    x, cos, sin, ids = moved(arguments(40, 3, 40, 19), backend, dtype)
    _, cos, sin, _ = moved(arguments(40, 3, 40, 19), backend, torch.float32)
    truth = plain(x.double(), cos.double(), sin.double(), ids)
    with serving(backend):
        got = rotary(x, cos, sin, ids)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-6)


@on_every_backend_in_float32
def test_tables_of_another_dtype(backend: Backend) -> None:
    x, cos, sin, ids = moved(arguments(7, 3, 20, 9), backend, torch.float32)
    with serving(backend):
        for other in (torch.bfloat16, torch.float64):
            c, s = cos.to(other), sin.to(other)
            assert torch.equal(rotary(x, c, s, ids), rotary(x, c.float(), s.float(), ids))


@on_every_backend
def test_a_row_reads_its_own_position(backend: Backend, dtype: torch.dtype) -> None:
    """A row alone is the row in a batch, and what stands at positions that no row has does not matter."""
    x, cos, sin, ids = moved(arguments(23, 3, 35, 17), backend, dtype)
    assert bool((ids.diff() < 0).any()) and len(ids.unique()) < len(ids)
    absent = torch.ones(len(cos), dtype=torch.bool, device=ids.device).index_fill(0, ids, False)
    assert bool(absent.any())
    with serving(backend):
        whole = rotary(x, cos, sin, ids)
        poisoned = (table.masked_fill(absent[:, None], torch.nan) for table in (cos, sin))
        assert torch.equal(rotary(x, *poisoned, ids), whole)
        for row in range(len(x)):
            here = slice(row, row + 1)
            assert torch.equal(rotary(x[here], cos, sin, ids[here]), whole[here])


@on_every_backend
def test_views(backend: Backend, dtype: torch.dtype) -> None:
    """Heads of one projection, transposed, every other: each the same as its contiguous copy."""
    x, cos, sin, ids = moved(arguments(9, 4, 20, 9), backend, dtype)
    other = torch.full_like(x, torch.nan)
    side_by_side = torch.stack([other, x, other], dim=1)[:, 1]  # of [T, 3, H, D]
    in_a_head = torch.cat([other, x, other], dim=2)[..., 20:40]  # of [T, H, 3 D]
    heads_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    elements_first = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    every_other = torch.stack([ids, -ids], dim=1)[:, 0]
    with serving(backend):
        whole = rotary(x, cos, sin, ids)
        for view in (side_by_side, in_a_head, heads_first, elements_first):
            assert not view.is_contiguous()
            got = rotary(view, cos, sin, ids)
            assert got.is_contiguous() and torch.equal(got, whole)
            assert rotary(view[:0], cos, sin, ids[:0]).shape == (0, 4, 20)
        assert torch.equal(rotary(x, cos.T.contiguous().T, torch.stack([sin, cos], 2)[..., 0], every_other), whole)
        one = rotary(x[:, :1].expand(-1, 4, -1), cos, sin, ids)  # heads that share their memory
        assert torch.equal(one, rotary(x[:, :1], cos, sin, ids).expand(-1, 4, -1))


@on_every_backend_in_float32
def test_products_depend_on_the_distance_alone(backend: Backend) -> None:
    """What the op is for: q at m times k at n is q at m + 20 times k at n + 20."""
    x, cos, sin, ids = moved(arguments(11, 3, 32, 16), backend, torch.float32)
    q, k = x, x.flip(0)
    m, n = ids % 17, ids.flip(0) % 13
    with serving(backend):
        here = (rotary(q, cos, sin, m) * rotary(k, cos, sin, n)).sum(-1)
        there = (rotary(q, cos, sin, m + 20) * rotary(k, cos, sin, n + 20)).sum(-1)
        elsewhere = (rotary(q, cos, sin, m + 20) * rotary(k, cos, sin, n)).sum(-1)
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)
    assert float((elsewhere - here).abs().max()) > 1


@on_every_backend
@pytest.mark.parametrize("family", [modeling_esm, modeling_modernbert], ids=["esm", "modernbert"])
def test_the_convention_of_transformers(backend: Backend, dtype: torch.dtype, family: Any) -> None:
    if dtype == torch.float64:
        pytest.skip("transformers rotates in float32")
    x, cos, sin, ids = moved(arguments(19, 4, 24, 12), backend, dtype)
    _, cos, sin, _ = moved(arguments(19, 4, 24, 12), backend, torch.float32)
    with serving(backend):
        got = rotary(x, cos, sin, ids)
    tables = [torch.cat([table, table], -1)[ids][None] for table in (cos, sin)]  # [1, T, D]
    batch = x.transpose(0, 1)[None]  # [1, H, T, D]
    apply = family.apply_rotary_pos_emb
    if "q" in inspect.signature(apply).parameters:
        turned, again = apply(batch, batch, *tables)
        assert torch.equal(turned, again)
    else:  # ESM's, in early versions of transformers 5
        turned = apply(batch, *(table[None] for table in tables))
    expected = turned[0].transpose(0, 1).to(dtype)
    torch.testing.assert_close(got, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@on_every_cpu_path
def test_threads_change_nothing(backend: Backend) -> None:
    given = moved(arguments(333, 5, 65, 31), backend, torch.float32)
    threads = torch.get_num_threads()
    try:
        with serving(backend):
            alone = rotary(*given)
            torch.set_num_threads(3)
            assert torch.equal(rotary(*given), alone)
    finally:
        torch.set_num_threads(threads)


@on_every_cpu_path
def test_arguments_that_do_not_fit(backend: Backend) -> None:
    given = moved(arguments(3, 2, 9, 4), backend, torch.float32)
    x, cos, sin, ids = given
    wide = torch.cat([cos, cos], 1)
    wrong = {
        r"x must be \[rows, heads, width\]": [x[0], cos, sin, ids],
        r"cos must be \[positions, half": [x, cos[0], sin, ids],
        r"sin must be \[positions, half": [x, cos, sin[None], ids],
        r"cos is \[37, 4\] and sin \[36, 4\]": [x, cos, sin[:36], ids],
        r"cos is \[37, 4\] and sin \[37, 3\]": [x, cos, sin[:, :3], ids],
        "tables of width 8 rotate 16 elements of a head; a head has 9": [x, wide, wide, ids],
        "position_ids must be int64": [x, cos, sin, ids.int()],
        "position_ids must be one contiguous row": [x, cos, sin, ids[None]],
        "there are 2 for 3 rows": [x, cos, sin, ids[:2]],
        r"position_ids\[1\] is 37; cos and sin have rows 0 to 36": [x, cos, sin, torch.tensor([36, 37, -1])],
        r"position_ids\[2\] is -1; ": [x, cos, sin, torch.tensor([36, 0, -1])],
    }
    for message, values in wrong.items():
        with serving(backend), pytest.raises(RuntimeError, match=message):
            rotary(*values)


@on_every_backend_in_float32
@pytest.mark.parametrize("shape", [(3, 2, 9, 4), (5, 1, 16, 8), (0, 2, 8, 4)], ids=str)
def test_registration(backend: Backend, shape: tuple[int, int, int, int]) -> None:
    check_registration(backend, rotary, arguments(*shape))


@on_every_backend_in_float32
def test_registration_of_a_view(backend: Backend) -> None:
    x, cos, sin, ids = moved(arguments(3, 2, 9, 4), backend, torch.float32)
    view = torch.stack([x, x], dim=1)[:, 1]
    assert not view.is_contiguous()
    check_registration(backend, rotary, [view, cos, sin, ids])
