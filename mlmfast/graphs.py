"""CUDA graphs: a small batch whose shape returns is replayed in one launch instead of hundreds.

A pass over few rows takes as long as it takes the host to launch its kernels. A graph records them with every address,
size and number that they were given, and a replay gives them the same ones again. So a recording serves a batch only if
all of that is the same: batches find theirs by their shape, and all are forgotten when a tensor of the model stands
elsewhere or is laid out otherwise than it was, or torch's settings or stream are others. Weights changed in place are
read anew by a replay. A backend that serves CUDA therefore must not keep tensors of its own from one call to the next:
a recording would read them where they were.

While a shape is recorded, which happens once, no other thread may wait for the whole device
(``torch.cuda.synchronize``): CUDA would end the recording.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

from mlmfast.architectures.spec import EncoderSpec
from mlmfast.budget import out_of_memory
from mlmfast.packing import Batch
from mlmfast.staging import laid_over, staged

# What a pass computes: whole copies, or an incremental step's rows.
B = TypeVar("B", bound=Batch)
# A pass over a batch on the weights' device, with the mask token's id: hidden states [R, e].
Pass = Callable[[EncoderSpec, B, int], Tensor]
# Runs what it is given, and returns a function that does the same work once more, on what then stands in the same
# tensors, and gives the same output tensor, overwritten.
Recorder = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]

# Rows above which the kernels of a base model take longer than their launches.
MOST_ROWS = 4096
# Recording costs some passes and a synchronisation, so a shape has to come this often first ...
TIMES = 3
# ... among this many shapes. When so many are recorded, all are dropped for the next.
REMEMBERED = 256
MOST_RECORDINGS = 64


@dataclass(frozen=True)
class Recording:
    """A recorded pass.

    Attributes:
        buffer: uint8 ``[bytes]``, where the pass reads its batch, laid out as :func:`mlmfast.staging.staged` does.
        replay: runs it, and returns its output ``[R, e]``, which the next replay overwrites.
    """

    buffer: Tensor
    replay: Callable[[], Tensor]


class NotBegun(RuntimeError):
    """A recording that was refused before it touched the device: what is recorded stays good."""


class CudaRecorder:
    """Records passes as CUDA graphs of one memory pool: they never run at the same time, so each may use it all.

    A graph that goes takes cuBLAS's workspace of its stream with it (torch 2.13), which the others of that stream still
    use. So all of a recorder's recordings go together, and no two recorders that live have the same stream.
    """

    # One recording at a time in a process: the beginning of another would wait for the device, and so end this one.
    _turn: ClassVar[threading.Lock] = threading.Lock()
    _living: ClassVar[WeakSet[CudaRecorder]] = WeakSet()
    # Why nothing more can be recorded in this process; None while it can.
    _spoilt: ClassVar[str | None] = None

    def __init__(self, device: torch.device) -> None:
        with CudaRecorder._turn:
            taken = {one._stream.cuda_stream for one in CudaRecorder._living}
            self._stream: torch.cuda.Stream = _own_stream(device, taken)
            CudaRecorder._living.add(self)
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        with CudaRecorder._turn:
            if CudaRecorder._spoilt is not None:
                raise NotBegun(f"an earlier recording of this process has failed: {CudaRecorder._spoilt}")
            current = torch.cuda.current_stream(self._stream.device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):  # around the capture too, which does not leave its stream if it fails
                # What happens once must not be recorded: kernels are compiled, cuBLAS finds a workspace for the stream.
                try:
                    run()
                finally:
                    current.wait_stream(self._stream)  # what it was given may be freed
                graph, output = self._recorded(run)
            current.wait_stream(self._stream)
        self._graphs.add(graph)

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay

    def _recorded(self, run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        pool = next((one.pool() for one in self._graphs), None)  # a pool goes with its last graph
        try:
            # Other threads may go on allocating meanwhile.
            with torch.cuda.graph(graph, pool, self._stream, capture_error_mode="thread_local"):
                return graph, run()
        except Exception as error:
            # Out of memory ends a recording in order. Else torch (2.11) goes on as if it were recording: the next one
            # into the pool fails, freed memory is never handed back, and random numbers of the device are refused.
            if not (isinstance(error, (RuntimeError, MemoryError)) and out_of_memory(error)):
                CudaRecorder._spoilt = f"{type(error).__name__}: {error}"
            raise


def _own_stream(device: torch.device, taken: set[int]) -> torch.cuda.Stream:
    """A stream that is not taken, of the 32 that torch hands out in turn; the same one again when it is free, since
    cuBLAS keeps a workspace for each that it has seen (torch 2.11)."""
    streams = sorted((torch.cuda.Stream(device) for _ in range(32)), key=lambda stream: stream.cuda_stream)
    for stream in streams:
        if stream.cuda_stream not in taken:
            return stream
    raise NotBegun("as many models and generations record at once as torch has streams")


class Graphs(Generic[B]):
    """Runs a pass over batches, and records and replays it where that pays.

    Args:
        compute: the pass. It must not wait for the device, and must launch the same kernels for the same shapes.
        recorder: makes what records on a device.
    """

    def __init__(self, compute: Pass[B], recorder: Callable[[torch.device], Recorder] = CudaRecorder) -> None:
        self._compute = compute
        self._make_recorder = recorder
        self._recorder: Recorder | None = None
        self._setting: Hashable = None
        self._seen: OrderedDict[Hashable, int] = OrderedDict()  # how often a shape has come, the latest last
        self._recordings: dict[Hashable, Recording] = {}
        self._refused: set[Hashable] = set()
        self._warned = False
        self._lock = threading.Lock()  # a recording has one place for its batch and one for its output

    def over(self, spec: EncoderSpec, mask_token_id: int, device: torch.device) -> Callable[[B], Tensor]:
        """The pass from a batch on the host to hidden states ``[R, e]``.

        Ask for it in each request: what the model's tensors are is looked at here, not in every batch.
        """
        setting = (device, *_settings(device), mask_token_id, signature(spec))
        return partial(self._run, spec, mask_token_id, device, setting)

    def forget(self) -> bool:
        """Drops all recordings and their memory. Returns whether there were any."""
        with self._lock:
            return self._forget()

    def _forget(self) -> bool:
        self._seen.clear()
        self._refused.clear()
        return self._drop()

    def _drop(self) -> bool:
        """All recordings at once, and what made them: see :class:`CudaRecorder`. Returns whether there were any."""
        held = bool(self._recordings)
        self._recordings.clear()
        self._recorder = None
        return held

    def _run(self, spec: EncoderSpec, mask_token_id: int, device: torch.device, setting: Hashable, batch: B) -> Tensor:
        if batch.tokens <= MOST_ROWS:
            with self._lock:
                recording = self._recording(spec, mask_token_id, device, setting, batch)
                if recording is not None:
                    recording.buffer.copy_(staged(batch.encoded(), device), non_blocking=True)
                    return recording.replay().clone()
        return self._compute(spec, batch.to(device), mask_token_id)

    def _recording(
        self, spec: EncoderSpec, mask_token_id: int, device: torch.device, setting: Hashable, batch: B
    ) -> Recording | None:
        """The recording that serves a batch, made now if its time has come; None for a plain pass."""
        if setting != self._setting:
            self._forget()
            self._setting = setting
        key = batch.shape()
        if key in self._recordings:
            return self._recordings[key]
        if key in self._refused:
            return None
        times = self._seen[key] = self._seen.pop(key, 0) + 1
        if len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        if times < TIMES:
            return None
        del self._seen[key]
        if len(self._recordings) == MOST_RECORDINGS:
            self._drop()
        try:
            recording = self._record(spec, mask_token_id, device, batch)
        except BaseException as error:  # whatever it is, the plain pass either works or says so itself
            if not isinstance(error, NotBegun):
                self._drop()  # the others' workspace may have gone with the one that failed
            if not isinstance(error, Exception):  # an interrupt
                raise
            # Where memory ended, too, until all are forgotten: this one would drop the others each time that it comes.
            self._refused.add(key)
            if isinstance(error, (RuntimeError, MemoryError)) and out_of_memory(error):
                return None
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"a pass could not be recorded as a CUDA graph and runs without, which is slower for short texts "
                    f"({type(error).__name__}: {error}); torch may refuse random numbers of the device from now on; "
                    "load(..., cuda_graphs=False) does not try",
                    stacklevel=2,
                )
            return None
        self._recordings[key] = recording
        return recording

    def _record(self, spec: EncoderSpec, mask_token_id: int, device: torch.device, batch: B) -> Recording:
        if self._recorder is None:
            self._recorder = self._make_recorder(device)
        buffer = staged(batch.encoded(), device).to(device)
        resident = batch.over(laid_over(buffer, batch.encoded()))
        return Recording(buffer, self._recorder(lambda: self._compute(spec, resident, mask_token_id)))


def signature(part: Any) -> Hashable:
    """What a recording holds fast of a spec: where each tensor is and how it is laid out, and every number."""
    if isinstance(part, Tensor):
        return (part.data_ptr(), part.dtype, tuple(part.shape), part.stride(), part.device)
    if is_dataclass(part):
        return tuple(signature(getattr(part, field.name)) for field in fields(part))
    if isinstance(part, (list, tuple)):
        return tuple(signature(one) for one in part)
    return part


def _settings(device: torch.device) -> tuple[Hashable, ...]:
    """The stream, and what else of torch's state chooses kernels."""
    products = torch.backends.cuda.matmul
    return (
        torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None,
        products.fp32_precision,
        products.allow_bf16_reduced_precision_reduction,
        products.allow_fp16_reduced_precision_reduction,
        products.allow_fp16_accumulation,
        torch.backends.cuda.preferred_blas_library(),
        torch.are_deterministic_algorithms_enabled(),
    )
