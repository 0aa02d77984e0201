"""masked_embedding: token ids of packed copies, masks put in, to embeddings."""

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

from mlmfast.ops.masked_embedding import masked_embedding

VOCABULARY, MASK = 23, 4


def plain(
    token_ids: Tensor,
    masked_rows: Tensor,
    mask_token_id: int,
    words: Tensor,
    position_ids: Tensor | None = None,
    positions: Tensor | None = None,
    token_types: Tensor | None = None,
    types: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-12,
    copy_scale: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """One row after the other."""
    masked = set(masked_rows.tolist())
    out = words.new_zeros(len(token_ids), words.shape[1])
    for row, token in enumerate(token_ids.tolist()):
        x = words[mask_token_id if row in masked else token]
        if copy_scale is not None and cu_seqlens is not None:
            x = x * copy_scale[max(c for c in range(len(copy_scale)) if int(cu_seqlens[c]) <= row)]
        if positions is not None and position_ids is not None:
            x = x + positions[int(position_ids[row])]
        if types is not None:
            x = x + types[0 if token_types is None else int(token_types[row])]
        if norm_weight is not None:
            x = x - x.mean()
            x = x / torch.sqrt((x * x).mean() + eps) * norm_weight + (0 if norm_bias is None else norm_bias)
        out[row] = x
    return out


def arguments(lengths: list[int], width: int = 16, given: str = "positions types norm bias") -> list[Any]:
    rows = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    masked = torch.randperm(rows, generator=generator)[: rows // 3].sort().values
    options: dict[str, Any] = {
        "positions": [torch.cat([torch.arange(n) for n in lengths]) + 1, randn(max(lengths) + 1, width, seed=2)],
        "token types": torch.randint(0, 2, (rows,), generator=generator),
        "types": randn(2, width, seed=3),
        "norm": 1 + 0.5 * randn(width, seed=4),
        "bias": randn(width, seed=5),
        "scale": [1 + 0.3 * randn(len(lengths), seed=6), bounds(lengths)],
    }
    nothing = [None, None]
    return [
        torch.randint(0, VOCABULARY, (rows,), generator=generator),
        masked,
        MASK,
        randn(VOCABULARY, width, seed=1),
        *(options["positions"] if "positions" in given else nothing),
        options["token types"] if "token types" in given else None,
        options["types"] if "types" in given else None,
        options["norm"] if "norm" in given else None,
        options["bias"] if "bias" in given else None,
        1e-5,
        *(options["scale"] if "scale" in given else nothing),
    ]


@on_every_backend
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_masked_embedding(backend: Backend, dtype: torch.dtype, lengths: list[int]) -> None:
    assert_as_good_as_torch(backend, dtype, masked_embedding, plain, arguments(lengths))


@on_every_backend
@pytest.mark.parametrize(
    "given",
    [
        "",
        "norm",
        "norm bias",
        "positions",
        "types",
        "token types types norm bias",
        "scale",
        "scale positions norm bias",
    ],
)
def test_what_may_be_left_out(backend: Backend, dtype: torch.dtype, given: str) -> None:
    assert_as_good_as_torch(backend, dtype, masked_embedding, plain, arguments([5, 1, 8], given=given))


@on_every_backend_in_float32
@pytest.mark.parametrize("width", [1, 3, 7, 15, 16, 17, 63, 65, 257, 768, 1000])
def test_widths(backend: Backend, width: int) -> None:
    assert_as_good_as_torch(backend, torch.float32, masked_embedding, plain, arguments([3, 4], width))


@on_every_backend_in_float32
@pytest.mark.parametrize("masked", [[], [0], [0, 1, 2, 3, 4, 5, 6]])
def test_masks_nowhere_and_everywhere(backend: Backend, masked: list[int]) -> None:
    given = arguments([3, 4])
    given[1] = torch.tensor(masked, dtype=torch.int64)
    assert_as_good_as_torch(backend, torch.float32, masked_embedding, plain, given)


@on_every_backend_in_float32
def test_no_rows(backend: Backend) -> None:
    given = moved(arguments([1]), backend, torch.float32)
    for i in (0, 1, 4, 6):  # token ids, masked rows, position ids, token types
        given[i] = given[i] if given[i] is None else given[i][:0]
    with serving(backend):
        assert masked_embedding(*given).shape == (0, 16)


@on_every_backend
def test_tables_wherever_their_rows_begin(backend: Backend, dtype: torch.dtype) -> None:
    """Slices of wider tables and transposed ones: each the same as its contiguous copy."""
    given = moved(arguments([5, 3], 24), backend, dtype)
    with serving(backend):
        whole = masked_embedding(*given)
        for place in (3, 5, 7):  # words, positions, types
            table = given[place]
            for view in (torch.cat([table, table], dim=1)[:, 24:], table.T.contiguous().T):
                assert torch.equal(masked_embedding(*given[:place], view, *given[place + 1 :]), whole)


@on_every_cpu_path
@pytest.mark.parametrize("bad", ["-1", "end", "far"])
@pytest.mark.parametrize(
    ("place", "end", "message"),
    [
        (0, 23, "words has rows 0 to 22"),
        (1, 8, "there are 8 rows"),
        (2, 23, "words has rows 0 to 22"),
        (4, 6, "positions has rows 0 to 5"),
        (6, 2, "types has rows 0 to 1"),
    ],
)
def test_ids_out_of_range_name_their_table(backend: Backend, place: int, end: int, message: str, bad: str) -> None:
    """Nothing is read or written outside: an error instead."""
    given = moved(arguments([5, 3], given="positions token types types norm"), backend, torch.float32)
    value = {"-1": -1, "end": end, "far": 1 << 40}[bad]
    if place == 2:
        given[2] = value
    else:
        unmasked = next(i for i in range(8) if i not in given[1].tolist())
        given[place][0 if place == 1 else unmasked] = value
    with serving(backend), pytest.raises(RuntimeError, match=message):
        masked_embedding(*given)


@on_every_cpu_path
def test_bounds_that_do_not_fit(backend: Backend) -> None:
    given = moved(arguments([5, 3], given="scale"), backend, torch.float32)
    for bounds_, message in [([0, 5, 9], "run from 0"), ([1, 5, 8], "run from 0"), ([0, 9, 8], "out of order")]:
        given[-1] = torch.tensor(bounds_, dtype=torch.int32)
        with serving(backend), pytest.raises(RuntimeError, match=message):
            masked_embedding(*given)
    given[-1] = torch.tensor([0, 8], dtype=torch.int32)
    with serving(backend), pytest.raises(RuntimeError, match="as many copies"):
        masked_embedding(*given)


@on_every_backend_in_float32
@pytest.mark.parametrize("given", ["", "positions types norm bias", "token types types scale"])
def test_registration(backend: Backend, given: str) -> None:
    check_registration(backend, masked_embedding, arguments([3, 2], given=given))
