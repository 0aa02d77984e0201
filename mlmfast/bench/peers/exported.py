"""The strongest that a user can assemble on a CPU: the model exported to ONNX Runtime or OpenVINO, its head on the
scored rows only.

Several ways through one runtime differ by tens of percent, one way here and the other there (all copies in one batch or
few at a time; one exporter or the other; a graph for any shape or for exactly this one). The first call for a request
tries them, and the fastest is kept.
"""

from __future__ import annotations

import copy
import importlib
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mlmfast.bench.peers.huggingface import with_own_attention
from mlmfast.bench.peers.scored import ScoredRows
from mlmfast.bench.peers.subject import PaddedBatch, Subject, batch_shapes, copy_lengths, padded_batches
from mlmfast.masking import MaskPlan

# Padded rows at once where nothing else is asked for: position scores of DeBERTa-v3-base for so many are 0.8 GB.
ALL_TOKENS = 1 << 15
# Batches tried besides: they stay in caches.
SMALLER = (32, 8)
# A graph for one shape has DeBERTa's position tables folded in, once a copy and layer: 1.2 GB for 32 copies.
MOST_EXACT = 32
# Inputs and the names of their axes, all of which vary.
AXES = {
    "input_ids": {0: "batch", 1: "length"},
    "attention_mask": {0: "batch", 1: "length"},
    "rows": {0: "scored"},
    "targets": {0: "scored"},
}
INPUTS = tuple(AXES)


@dataclass(frozen=True)
class Way:
    """A graph, and how many copies it is given at once."""

    graph: str
    batch: int

    def __str__(self) -> str:
        return f"{self.graph}, at most {self.batch} copies a batch"


class Exported:
    """What both runtimes share: which ways there are, and the fastest of them."""

    graphs: ClassVar[tuple[str, ...]]
    rounds: ClassVar[bool] = False

    def __init__(self, subject: Subject) -> None:
        self.pad_token_id = subject.tokenizer.pad_token_id
        self.batch = subject.batch
        self._request = b""
        self._way: Way | None = None

    def way(self) -> str:
        return str(self._way)

    def logprobs(self, plan: MaskPlan) -> np.ndarray:
        request = copy_lengths(plan).tobytes()
        if request != self._request:
            self._forget()
            ways = self._ways(plan)
            self._way = fastest({way: partial(self._compute, way, plan) for way in ways})
            self._request = request
        assert self._way is not None
        return self._compute(self._way, plan)

    def _ways(self, plan: MaskPlan) -> list[Way]:
        whole = max(1, min(plan.copies, ALL_TOKENS // int(copy_lengths(plan).max())))
        batches = {whole, *(size for size in SMALLER if size < whole)}
        if self.batch is not None:
            batches = {min(self.batch, plan.copies)}
        ways = [Way(graph, size) for graph in self.graphs for size in sorted(batches, reverse=True)]
        return [way for way in ways if self._serves(way, plan)]

    def _compute(self, way: Way, plan: MaskPlan) -> np.ndarray:
        found = np.empty(len(plan.targets), np.float32)
        for batch in padded_batches(plan, self.pad_token_id, way.batch):
            found[batch.order] = self._run(way, batch)
        return found

    def _serves(self, way: Way, plan: MaskPlan) -> bool:
        return True

    def _forget(self) -> None:
        """What was made for the last request alone."""

    def _run(self, way: Way, batch: PaddedBatch) -> np.ndarray:
        raise NotImplementedError


def fastest(ways: dict[Way, Callable[[], object]]) -> Way:
    """The fastest of some ways: each runs once to get warm and once timed, the better ones once more."""
    if len(ways) == 1:
        return next(iter(ways))
    seconds = {}
    for way, run in ways.items():
        run()
        seconds[way] = _timed(run)
    good = [way for way in ways if seconds[way] <= 1.3 * min(seconds.values())]
    for way in good:
        seconds[way] = min(seconds[way], _timed(ways[way]))
    return min(good, key=seconds.__getitem__)


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class OnnxRuntime(Exported):
    """ONNX Runtime, float32, all its graph optimisations, as many threads as torch.

    torch has two exporters to ONNX, and neither's graph is always the faster. Its threads do not spin on after a run,
    which would slow down whatever is measured next.
    """

    name: ClassVar[str] = "onnxruntime"
    dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnx", "onnxscript")
    graphs: ClassVar[tuple[str, ...]] = ("exported by torch.export", "exported by TorchScript")

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        module = _exportable(subject)
        self._sessions = dict(zip(self.graphs, (self._session(module, dynamo) for dynamo in (True, False))))

    @staticmethod
    def _session(module: ScoredRows, dynamo: bool) -> Any:
        runtime = importlib.import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        with tempfile.TemporaryDirectory() as folder, _quiet():
            path = str(Path(folder) / "model.onnx")
            inputs: dict[str, Any] = {"input_names": list(INPUTS), "output_names": ["logprobs"], "dynamo": dynamo}
            if dynamo:
                inputs["dynamic_shapes"] = tuple(
                    dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in AXES.values()
                )
                inputs["verbose"] = False
            else:
                inputs["dynamic_axes"] = AXES
                inputs["opset_version"] = 17
            torch.onnx.export(module, _example(), path, **inputs)
            return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def _run(self, way: Way, batch: PaddedBatch) -> np.ndarray:
        inputs = {name: getattr(batch, name).numpy() for name in INPUTS}
        return self._sessions[way.graph].run(None, inputs)[0]


class OpenVINO(Exported):
    """OpenVINO, with its latency hint and as many threads as torch.

    float32 is float32 all through. bfloat16 is OpenVINO's own mode: the float32 model (here with the weights of the
    bfloat16 one) under the hint that products may be bfloat16.
    """

    name: ClassVar[str] = "openvino"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    packages: ClassVar[tuple[str, ...]] = ("openvino",)
    graphs: ClassVar[tuple[str, ...]] = ("for any shape", "for this shape")

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self._runtime = importlib.import_module("openvino")
        self._core = self._runtime.Core()
        self._hints = {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[subject.dtype],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        with _quiet():
            example = dict(zip(INPUTS, _example()))
            self._model = self._runtime.convert_model(_exportable(subject), example_input=example)
        self._any_shape = self._request_of(self._model)
        self._exact: dict[tuple[int, ...], Any] = {}

    def _request_of(self, model: Any) -> Any:
        return self._core.compile_model(model, "CPU", self._hints).create_infer_request()

    def _serves(self, way: Way, plan: MaskPlan) -> bool:
        exact = way.graph == self.graphs[1]
        return not exact or (way.batch <= MOST_EXACT and len(batch_shapes(plan, way.batch)) <= 2)

    def _forget(self) -> None:
        self._exact.clear()

    def _run(self, way: Way, batch: PaddedBatch) -> np.ndarray:
        inputs = [getattr(batch, name).numpy() for name in INPUTS]
        request = self._any_shape
        if way.graph == self.graphs[1]:
            shape = (*batch.input_ids.shape, len(batch.rows))
            if shape not in self._exact:
                model = self._model.clone()
                model.reshape({place: list(array.shape) for place, array in enumerate(inputs)})
                self._exact[shape] = self._request_of(model)
            request = self._exact[shape]
        return request.infer(inputs)[0]


def _exportable(subject: Subject) -> ScoredRows:
    """The model in float32, which both runtimes start from, with transformers' own choice of attention.

    DeBERTa's mask is narrowed to keys. As it stands, a padding row sees nothing at all: every score of it is float32's
    least number, which OpenVINO's bfloat16 rounds to -inf, and its softmax is NaN for the whole copy.
    """
    model = with_own_attention(subject.twin() if subject.dtype == "float32" else copy.deepcopy(subject.model).float())
    if hasattr(model, "deberta"):
        model.deberta.encoder.get_attention_mask = _keys_only
    return ScoredRows(model).eval()


def _keys_only(attention_mask: Tensor) -> Tensor:
    return attention_mask[:, None, None, :]


def _example() -> tuple[Tensor, ...]:
    """Inputs to trace with: three copies of eleven tokens, one of them padded."""
    attention_mask = torch.ones(3, 11, dtype=torch.long)
    attention_mask[1, 9:] = 0
    rows = torch.tensor([1, 12, 23])
    return torch.full((3, 11), 5), attention_mask, rows, torch.full((3,), 6)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracers' notes on what they assume: agreement is checked on every request."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
