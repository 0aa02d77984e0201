"""Shards computed here, or by other processes of this machine: what yields each one's line of the manifest."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mlmfast.corpus import Job, windows
from mlmfast.cpu import products
from mlmfast.doctor import processor
from mlmfast.errors import MLMFastError
from mlmfast.identity import digest, versions
from mlmfast.model import MaskedLM
from mlmfast.shards import Compute, Shard, ShardFolder, written
from mlmfast.writers import Record, Sink, Tally

Advance = Callable[[Tally], None]


# What torch and oneDNN may keep of what they have prepared for products, and how much: one for each number of rows that
# a product has had. A batch has some ten kinds of product.
PREPARED = {"LRU_CACHE_CAPACITY": 128, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": 128}


@dataclass(frozen=True)
class Computing:
    """A model that is ready.

    Attributes:
        generic: its own code computes it.
        windows: computes windows of rows; None where other processes do.
        shards: computes shards of a folder; None where there is no folder. On Ray they are read elsewhere, too, and
            none are given to it.
    """

    generic: bool
    windows: Any = None
    shards: Any = None


@contextmanager
def in_this_process(
    sink: Sink | ShardFolder,
    load: Callable[[], tuple[MaskedLM, Compute]],
    columns: dict[str, str],
    most: int | None,
    *,
    advance: Advance,
) -> Iterator[Computing]:
    """Computes here, one shard after the other.

    Args:
        sink: where records go.
        load: the model, and what computes windows with it.
        columns: of Parquet.
        most: rows of a window.
        advance: told the counts of every window.
    """
    bound_memory()
    lm, compute = load()
    if not isinstance(sink, ShardFolder):
        yield Computing(lm.generic, windows=compute)
        return
    facts = sink.agree(facts_of(lm))

    def shards(todo: Iterator[Shard]) -> Iterator[Record]:
        for shard in todo:
            yield written(shard, sink.paths(), columns, compute, partial(windows, most=most), advance)

    with computing_as(lm, facts):
        yield Computing(lm.generic, shards=shards)


def facts_of(lm: MaskedLM) -> Record:
    """What a manifest keeps of a model: what must be the same where a run is continued, and what may differ."""
    facts: Record = {"weights": digest(lm.model, lm.tokenizer, lm.extras), "batch_tokens": lm.batch_tokens}
    facts |= {"dtype": str(lm.dtype).removeprefix("torch."), "device": lm.device.type, "generic": lm.generic}
    if lm.device.type == "cpu":
        facts |= {"products": of_this_machine(lm.dtype)}
    return facts | {"threads": torch.get_num_threads()} | versions()


def of_this_machine(dtype: torch.dtype) -> list[float | None]:
    """The kind of products that :mod:`mlmfast.cpu.products` chose when it first measured on this machine.

    Measured anew by every process, a choice that is a close one would fall differently, and with it last digits. It is
    kept in the user's cache folder (``XDG_CACHE_HOME``), a file for each processor, torch, dtype and number of threads;
    where that cannot be written it is measured.
    """
    key = json.dumps([processor(), torch.__version__, str(dtype), torch.get_num_threads()])
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mlmfast"
        path = folder / f"products-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            own = path.with_name(f"{path.name}.{os.getpid()}")
            try:
                own.write_text(json.dumps({"key": key, "least": products.chosen(dtype)}))
                with suppress(FileExistsError):  # another process was first: its choice counts
                    os.link(own, path)
            finally:
                own.unlink(missing_ok=True)
        return json.loads(path.read_text())["least"]
    except (OSError, ValueError, KeyError, RuntimeError):  # RuntimeError: there is no home
        return products.chosen(dtype)


@contextmanager
def computing_as(lm: MaskedLM, facts: Record) -> Iterator[None]:
    """Within the block a model computes as the one did that a manifest tells of: its batches, its kind of products."""
    lm.batch_tokens = facts["batch_tokens"]
    if lm.device.type != "cpu" or "products" not in facts:
        yield
        return
    with products.choosing(lm.dtype, facts["products"]):
        yield


def bound_memory() -> None:
    """Bounds what products leave behind in this process, before the first of them; what its user has set counts.

    Torch and oneDNN keep 1024 each, which the batches of a corpus come to: 0.7 GB with a model of 3 M parameters.
    Preparing one anew takes a fifth of a millisecond.
    """
    for name, most in PREPARED.items():
        os.environ.setdefault(name, str(most))


def cores_of(workers: int) -> int:
    """Each one's part of the cores that this process may use, and no more threads than torch has here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // workers, torch.get_num_threads()))


class Worker:
    """A model that computes shards, in whatever process.

    Args:
        job: what is done.
        threads: of torch on the CPU; None leaves them as they are.
        device: in place of the job's own; None for that.
    """

    def __init__(self, job: Job, threads: int | None = None, device: str | None = None) -> None:
        bound_memory()
        if threads is not None:
            torch.set_num_threads(threads)
        self.job = job if device is None else replace(job, loading={**job.loading, "device": device})
        self.lm = self.job.load()
        self.compute = job.compute(self.lm)

    def facts(self) -> Record:
        return facts_of(self.lm)

    def write(self, shard: Shard, paths: tuple[str, str], facts: Record) -> Record:
        cut = partial(windows, most=self.job.most)
        with computing_as(self.lm, facts):
            return written(shard, paths, self.job.columns, self.compute, cut)


@contextmanager
def in_processes(folder: ShardFolder, job: Job, workers: int, *, advance: Advance) -> Iterator[Computing]:
    """Shares shards out among processes, each with a model of its own and its part of the cores, or a GPU.

    The rows are read here and the manifest is written here, so that there is but one of both. A process that loses this
    one ends at once: it never writes into a folder that another run may be continuing.

    Args:
        folder: whose manifest is told of the model that the processes have loaded.
        job: what they do.
        workers: their number.
        advance: told the counts of every shard.

    Raises:
        MLMFastError: the model cannot be loaded; a process died.
    """
    context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
    others = multiprocessing.active_children()
    threads = cores_of(workers)
    pool = ProcessPoolExecutor(workers, context, _begin, (job, threads, context.Value("i", 0)))
    finished = False
    try:
        facts = folder.agree(pool.submit(_facts).result())
        shared = partial(_shared, pool, folder, facts, 2 * workers, advance)
        yield Computing(facts["generic"], shards=shared)
        finished = True
    except BrokenProcessPool as error:
        raise MLMFastError(
            "a worker died, perhaps for want of memory: take fewer --workers. Finished shards are kept, and the same "
            "command continues"
        ) from error
    finally:
        if not finished:
            for process in set(multiprocessing.active_children()).difference(others):
                process.terminate()
        pool.shutdown(cancel_futures=True)


def _shared(
    pool: ProcessPoolExecutor,
    folder: ShardFolder,
    facts: Record,
    ahead: int,
    advance: Advance,
    shards: Iterator[Shard],
) -> Iterator[Record]:
    """The engine: a few shards are waiting at any time, so that memory is bounded and nobody is idle."""
    running: set[Future[Record]] = set()
    for shard in shards:
        running.add(pool.submit(_write, shard, folder.paths(), facts))
        yield from _finished(running, advance, None if len(running) >= ahead else 0)
    while running:
        yield from _finished(running, advance, None)


def _finished(running: set[Future[Record]], advance: Advance, seconds: float | None) -> Iterator[Record]:
    """Those that are finished; waits so long for one of them, None for as long as it takes."""
    done, _ = wait(running, seconds, FIRST_COMPLETED)
    for future in done:
        running.remove(future)
        entry = future.result()
        advance(Tally.of_entry(entry))
        yield entry


# ---- in the other process

_worker: Callable[[], Worker] | None = None


def _begin(job: Job, threads: int, counter: Any) -> None:
    """Loads nothing yet: what goes wrong then is to reach the caller."""
    global _worker
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C reaches all; the parent says what is kept
    threading.Thread(target=_follow_parent, daemon=True).start()
    with counter.get_lock():
        place = counter.value
        counter.value += 1
    device = None
    if job.loading.get("device", "auto") in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{place % torch.cuda.device_count()}"
    loaded: list[Worker] = []

    def worker() -> Worker:
        if not loaded:
            loaded.append(Worker(job, threads, device))
        return loaded[0]

    _worker = worker


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _facts() -> Record:
    assert _worker is not None
    return _worker().facts()


def _write(shard: Shard, paths: tuple[str, str], facts: Record) -> Record:
    assert _worker is not None
    return _worker().write(shard, paths, facts)
