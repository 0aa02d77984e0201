"""Floating-point operations that an exact PLL needs, and the rate at which this machine multiplies matrices.

Their quotient with the time spent is the share of the peak: how much faster the same result could come, were
everything but its products free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from mlmfast.architectures.spec import EncoderSpec, Linear
from mlmfast.bench.timing import device_seconds
from mlmfast.generic import Spec
from mlmfast.packing import PackedBatch

# Square products and the shapes of base models' linears: [rows, in, out].
PRODUCTS = ((2048, 2048, 2048), (4096, 4096, 4096), (4096, 768, 3072), (4096, 3072, 768))
# The same on a GPU, which takes more to fill.
GPU_PRODUCTS = ((8192, 8192, 8192), (65536, 768, 3072), (65536, 3072, 768))
# Bytes of the copy that memory is measured by: many times the caches of a GPU, and of a CPU.
COPY_BYTES = 2 << 30
CPU_COPY_BYTES = 256 << 20


def useful_flops(spec: Spec, batches: Sequence[PackedBatch]) -> int:
    """Operations of the matrix products that cannot be left out, 2 a multiply-add.

    Counted: every row of every distinct copy through all layers but the last; of the last, keys and values of every
    row, and all else of scored rows only; the head of scored rows only. Attention has a dot product a (query, key)
    pair within reach and as much for mixing. DeBERTa's content-to-position term has a dot product for each *distinct*
    table row that a query meets, and position-to-content for each that a key meets: far distances share rows.

    Not counted: padding, position tables (projected once at load), norms, softmax, activations, look-ups. Counted
    although a cleverer program could share it between copies: the first layer's products of rows not masked.
    """
    assert isinstance(spec, EncoderSpec)  # what is benchmarked are families' shapes
    total = 0
    for batch in batches:
        rows, scored = batch.tokens, len(batch.scored_rows)
        projection = spec.embedding.projection
        total += 0 if projection is None else _product(rows, projection)
        for i, layer in enumerate(spec.layers):
            last = i == len(spec.layers) - 1
            # The enhanced mask decoder goes through the last layer twice, with the same keys and values.
            asking = (scored * (2 if spec.mask_decoder is not None else 1)) if last else rows
            total += _product(rows, layer.key) + _product(rows, layer.value)
            total += sum(_product(asking, product) for product in (layer.query, layer.output, layer.up, layer.down))
            if layer.convolution is not None:
                total += _product(asking, layer.convolution.linear)
        total += _attention_flops(spec, batch)
        total += _product(scored, spec.head.dense) + 2 * scored * spec.head.vocabulary.numel()
    return total


def _product(rows: int, linear: Linear) -> int:
    return 2 * rows * linear.weight.numel()


def _attention_flops(spec: EncoderSpec, batch: PackedBatch) -> int:
    """Scores, position terms and mixing, over all layers and copies of a batch."""
    width = spec.layers[0].query.weight.shape[0]  # H D
    bounds = batch.cu_scored.tolist()
    positions = batch.scored_positions.numpy()
    every_dots: dict[tuple[int, int], int] = {}  # copies of one length cost the same in layers of one window
    dots = 0
    passes = 2 if spec.mask_decoder is not None else 1
    *earlier, last = (layer.local_window for layer in spec.layers)
    for copy, length in enumerate(batch.cu_seqlens.diff().tolist()):
        for window in earlier:
            if (length, window) not in every_dots:
                every_dots[length, window] = _dots(spec, np.arange(length), length, window)
            dots += every_dots[length, window]
        dots += passes * _dots(spec, positions[bounds[copy] : bounds[copy + 1]], length, last)
    return 2 * width * dots


def _dots(spec: EncoderSpec, queries: np.ndarray, length: int, window: int) -> int:
    """:func:`attention_dots` of one layer."""
    if spec.buckets is None:
        return attention_dots(queries, length, None, window=window)
    first = spec.layers[0]
    terms = (first.pos_key is not None) + 2 * (first.pos_query is not None)
    return attention_dots(queries, length, spec.buckets.cpu().numpy(), terms)


def attention_dots(
    queries: np.ndarray, length: int, buckets: np.ndarray | None, terms: int = 3, window: int = -1
) -> int:
    """Products of ``H D`` numbers with as many that one attention needs for some queries of one copy.

    Args:
        queries: their places in the copy.
        length: its keys.
        buckets: table row of each distance, int ``[2 N + 1]``; None without position terms.
        terms: 1 for content-to-position, 2 for position-to-content, 3 for both.
        window: greatest distance that is attended; -1 for every one.
    """
    reached = np.full(len(queries), length)
    if window >= 0:
        reached = np.minimum(queries + window + 1, length) - np.maximum(queries - window, 0)
    dots = 2 * int(reached.sum())  # q.k, and mixing the values
    if buckets is None or not len(queries):
        return dots
    longest = len(buckets) // 2
    distances = np.clip(queries[:, None] - np.arange(length), -longest, longest)
    rows = buckets[distances + longest]  # [queries, length]
    if terms & 1:
        dots += _distinct(rows)
    if terms & 2:
        dots += _distinct(rows.T)
    return dots


def _distinct(rows: np.ndarray) -> int:
    """Number of distinct values in each line of a matrix, summed over the lines."""
    ordered = np.sort(rows, axis=1)
    return len(rows) + int((ordered[:, 1:] != ordered[:, :-1]).sum())


def weight_bytes(spec: Spec) -> int:
    """Bytes of weights that a pass of however few rows reads: every layer's products, the head's, the vocabulary."""
    assert isinstance(spec, EncoderSpec)
    products = [spec.head.dense.weight, spec.head.vocabulary]
    for layer in spec.layers:
        products += [x.weight for x in (layer.query, layer.key, layer.value, layer.output, layer.up, layer.down)]
        products += [] if layer.convolution is None else [layer.convolution.linear.weight]
    return sum(weight.numel() * weight.element_size() for weight in products)


class Peak:
    """The best rate seen of large matrix products, in the dtype, on the device and the threads of what is measured.

    Attributes:
        flops: operations a second; 0 before the first sample.
        source: the product that reached it.
    """

    def __init__(
        self, dtype: torch.dtype, products: Sequence[tuple[int, int, int]] | None = None, device: str = "cpu"
    ) -> None:
        self.flops = 0.0
        self.source = ""
        self._device = device
        if products is None:
            products = PRODUCTS if torch.device(device).type == "cpu" else GPU_PRODUCTS
        self._products = [
            (f"{kind} {rows}x{inner}x{outer}", 2 * rows * inner * outer, run)
            for rows, inner, outer in products
            for kind, run in _ways(rows, inner, outer, dtype, device)
        ]

    def sample(self) -> float:
        """Times every product once more; returns the best rate so far."""
        with torch.inference_mode():
            for name, operations, run in self._products:
                rate = operations / device_seconds(run, self._device)
                if rate > self.flops:
                    self.flops, self.source = rate, name
        return self.flops


def _ways(
    rows: int, inner: int, outer: int, dtype: torch.dtype, device: str
) -> Iterator[tuple[str, Callable[[], object]]]:
    """The ways that torch multiplies ``[rows, inner]`` by ``[inner, outer]``."""
    x = torch.randn(rows, inner, device=device).to(dtype)
    weight = torch.randn(outer, inner, device=device).to(dtype)
    yield "linear", lambda: F.linear(x, weight)
    if x.device.type != "cpu":
        return
    # oneDNN with a packed weight can be twice as fast (MKL is slow on some CPUs). These ops are private to torch,
    # and absent in some builds.
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        run = lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")  # noqa: E731
        run()
    except (AttributeError, RuntimeError, NotImplementedError):
        return
    yield "packed linear", run


def copy_bandwidth(device: str, size: int = COPY_BYTES, repeats: int = 10) -> float:
    """Bytes a second of a large copy within a device's memory, those read and those written: the median of some."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    run = lambda: target.copy_(source)  # noqa: E731
    run()
    return float(2 * size / np.median([device_seconds(run, device) for _ in range(repeats)]))
