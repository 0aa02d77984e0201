"""Shards on Ray Data, from a laptop to a cluster. Needs ray.

    read, a task a file -> a row a shard -> actors, each with a model -> lines of the manifest -> this process

Files are read through Ray's own datasource interface and by this package's readers, so that rows and shards are those
of the local engine. An actor writes the files of its shards itself, into a folder that all machines see: a datasink
would tell of them only at the end, and an interrupted run would not know what it has.
"""

from __future__ import annotations

import json
import logging
import os
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mlmfast.corpus import Job
from mlmfast.errors import MLMFastError, RequestError
from mlmfast.readers import Row
from mlmfast.shards import Shard, ShardFolder, prefix, shards_in
from mlmfast.sources import Inputs
from mlmfast.workers import Advance, Computing, Worker, cores_of
from mlmfast.writers import Record, Tally

# How often Ray starts an actor anew, and does a shard again: without a bound, a shard that kills whoever computes it is
# computed for ever.
RETRIES = 3
# What :func:`failure` calls an error, and what it is raised as again.
KINDS: dict[str, type[Exception]] = {"own": MLMFastError, "file": OSError, "defect": RuntimeError}


@contextmanager
def in_ray(folder: ShardFolder, job: Job, workers: int, inputs: Inputs, *, advance: Advance) -> Iterator[Computing]:
    """Computes shards by actors of Ray Data, each with a model, on a GPU of its own or a part of a machine's cores.

    A Ray that is running (``RAY_ADDRESS``, or :func:`ray.init` before this) is used; else one is started here. Where it
    has no room for all actors, those that fit do the work, and the others join them when there is. An actor that dies
    is started anew by Ray, and its shard is done again, a few times.

    Args:
        folder: of all machines; its manifest is written here.
        job: what is done.
        workers: actors.
        inputs: what is read, there.
        advance: told the counts of every shard.

    Raises:
        RequestError: there is no Ray, or none of its nodes has room for an actor.
        MLMFastError: as the local engine does; actors died again and again.
    """
    ray = imported()
    threads = cores_of(workers)
    with running(ray, threads * workers), quiet_data(ray):
        job, needs = placed(ray, job, threads, workers)
        facts = folder.agree(plain(lambda: ray.get(ray.remote(**needs)(facts_there).remote(job, threads))))
        digests, damaged = folder.digests(), frozenset(folder.damaged)

        def shards(ignored: Any) -> Iterator[Record]:
            source = datasource(inputs.resolved(), folder.shard_rows, digests, damaged)
            # Reading asks for no CPU: actors may hold all that there are, and would wait for their rows for ever. So
            # the number of readers, each a process, is bounded here.
            readers = min(workers, len(inputs.files))
            read = ray.data.read_datasource(
                source, override_num_blocks=len(inputs.files), num_cpus=0, concurrency=readers
            )
            found = read.map_batches(
                Scorer,
                fn_constructor_args=(job, threads, facts, folder.paths()),
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=workers),
                max_restarts=RETRIES,
                max_task_retries=RETRIES,
                **needs,
            )
            # Each as it comes: one that is held back to prefetch the next is lost when the run ends early.
            blocks = iter(found.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
            with closing(blocks):
                while (block := plain(lambda: next(blocks, None))) is not None:
                    for entry in map(json.loads, block["entry"].to_pylist()):
                        if "failed" in entry:
                            raise KINDS[entry["failed"]](*entry["said"])
                        elif "kept" in entry:
                            kept = folder.verified(entry["kept"], entry["input"], entry["texts_sha256"])
                            assert kept is not None  # a damaged one comes here only where its rows have changed
                            advance(Tally.of_entry(kept, kept=True))
                        else:
                            advance(Tally.of_entry(entry))
                            yield entry

        yield Computing(facts["generic"], shards=shards)


def imported() -> Any:
    """
    Raises:
        RequestError: there is no Ray.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise RequestError(f'--engine ray needs Ray ({error}): pip install "mlmfast[ray]"') from error
    return ray


@contextmanager
def running(ray: Any, cpus: int) -> Iterator[None]:
    """A Ray that this process is connected to; one that was started here, of so many CPUs, ends with the block.

    Raises:
        RequestError: there is none at ``RAY_ADDRESS``.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    address = os.environ.get("RAY_ADDRESS")
    # Without an address Ray would join one that happens to run on this machine, and refuse to be told its CPUs.
    here = {"address": address} if address else {"address": "local", "num_cpus": cpus}
    try:
        ray.init(**here, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    except ConnectionError as error:
        raise RequestError(
            f"no Ray can be reached at RAY_ADDRESS={address}: start it there (ray start --head), or unset RAY_ADDRESS "
            "and one is started here"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def quiet_data(ray: Any) -> Iterator[None]:
    """Ray Data as it is needed here; after the block it is as the process had it."""
    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    # A shard is a block, however small: what one task has read is shared out.
    settings = {"enable_progress_bars": False, "target_min_block_size": 1, "target_max_block_size": 1}
    before, level = {name: getattr(context, name) for name in settings}, logger.level
    try:
        for name, value in settings.items():
            setattr(context, name, value)
        logger.setLevel(logging.CRITICAL)  # it tells of every step it takes, and of errors, which are raised, too
        with warnings.catch_warnings():
            # Of fewer files than actors; and that bounds on retries will be given in another way, which is not there.
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        logger.setLevel(level)


def placed(ray: Any, job: Job, threads: int, workers: int) -> tuple[Job, dict[str, Any]]:
    """The job as an actor does it, wherever it is, and what Ray is to give each.

    Raises:
        RequestError: no node has as much, so that all would wait for ever.
    """
    if job.model != "tiny" and (folder := Path(job.model).expanduser()).is_dir():
        job = replace(job, model=str(folder.resolve()))  # actors have another working directory
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    device = str(job.loading.get("device", "auto"))
    needs: dict[str, Any] = {"num_cpus": threads, "num_gpus": 0}
    if device.startswith("cuda") or (device == "auto" and any(node.get("GPU") for node in nodes)):
        needs["num_gpus"] = 1
        job = replace(job, loading={**job.loading, "device": "cuda"})  # the only one that it sees
    rooms = [(node.get("GPU", 0), node.get("CPU", 0)) for node in nodes]
    if not any(gpus >= needs["num_gpus"] and cpus >= threads for gpus, cpus in rooms):
        gpus, cpus = max(rooms, default=(0, 0))
        remedy = (
            "take more --workers, who share this machine's CPUs out"
            if gpus >= needs["num_gpus"]
            else "take --device cpu"
        )
        raise RequestError(
            f"--workers {workers} is to give each {threads} CPUs and {needs['num_gpus']} GPUs, and the largest node of "
            f"this Ray has {cpus:g} and {gpus:g}: {remedy}"
        )
    return job, needs


def failure(error: Exception) -> Record:
    """An error as a record: from a dataset's tasks Ray brings no more than its text, and tries some again in vain."""
    if isinstance(error, OSError):
        return {"failed": "file", "said": [error.errno, error.strerror or str(error)]}
    if isinstance(error, MLMFastError):
        return {"failed": "own", "said": [str(error)]}
    return {"failed": "defect", "said": ["".join(traceback.format_exception(error))]}


def plain(compute: Callable[[], Any]) -> Any:
    """A value, or the error that Ray has wrapped into its own: one of this package, or of a file.

    Raises:
        MLMFastError: another error, or an actor died too often.
    """
    from ray.exceptions import OutOfMemoryError, RayActorError, RayError, WorkerCrashedError

    try:
        return compute()
    except RayError as error:
        cause: BaseException | None = error
        # Ray's own error is of both kinds: what it wraps is looked for.
        while isinstance(cause, RayError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if isinstance(cause, (MLMFastError, OSError)):
            raise cause from None
        if isinstance(error, (OutOfMemoryError, RayActorError, WorkerCrashedError)):
            raise MLMFastError(
                f"a worker of Ray died, and so did the {RETRIES} after it, perhaps for want of memory: take fewer "
                "--workers. Finished shards are kept, and the same command continues"
            ) from error
        raise MLMFastError(f"Ray gave up: {(str(error).strip() or type(error).__name__).splitlines()[-1]}") from error


def facts_there(job: Job, threads: int) -> Record:
    """What a manifest keeps of the model as an actor loads it."""
    return Worker(job, threads).facts()


def datasource(inputs: Inputs, shard_rows: int, digests: dict[str, str], damaged: frozenset[str]) -> Any:
    """A datasource of Ray's: a task a file, a row a shard, with its rows as JSON.

    Args:
        inputs: of absolute paths.
        shard_rows: most rows of a shard.
        digests: of the shards of the manifest. They come without rows, for the digest to be compared.
        damaged: those among them that are made again; with rows, unless they are others by now.
    """
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    # Each task is told of its own shards only: those of a corpus may be many, and so may its files.
    own: dict[str, dict[str, str]] = {}
    for name, digest in digests.items():
        own.setdefault(name.rpartition("-")[0], {})[name] = digest

    def task(number: int) -> Any:
        before = prefix(number, inputs.several).rpartition("-")[0]
        known = own.get(before, {})
        lost = known.keys() & damaged
        read = partial(shards_read, inputs.reader(number), inputs.names[number], before, shard_rows, known, lost)
        nothing = {"num_rows": None, "size_bytes": None, "exec_stats": None}
        return ReadTask(read, BlockMetadata(**nothing, input_files=(inputs.files[number],)))

    class Shards(Datasource):
        def get_read_tasks(self, parallelism: int, *arguments: Any, **options: Any) -> list[Any]:
            return [task(number) for number in range(len(inputs.files))]

        def estimate_inmemory_data_size(self) -> int | None:
            return None

    return Shards()


def shards_read(
    read: Callable[[], Iterable[Row]],
    input: str,
    before: str,
    shard_rows: int,
    digests: dict[str, str],
    damaged: Collection[str],
) -> Iterator[Any]:
    """A task: the shards of one file, ``before`` their numbers in names."""
    import pyarrow as pa

    def table(**values: str | None) -> Any:
        names = ("name", "input", "digest", "rows", "failed")
        return pa.table({name: pa.array([values.get(name)], pa.string()) for name in names})

    try:
        for shard in shards_in(input, read(), shard_rows, f"{before}-"):
            digest, content = shard.digest(), None
            if shard.name not in digests or (shard.name in damaged and digest == digests[shard.name]):
                content = json.dumps([[row.index, row.text, row.error, row.input] for row in shard.rows])
            yield table(name=shard.name, input=input, digest=digest, rows=content)
    except Exception as error:
        yield table(failed=json.dumps(failure(error)))


class Scorer:
    """An actor: shards -> lines of the manifest, their files written on the way, or what went wrong."""

    def __init__(self, job: Job, threads: int, facts: Record, paths: tuple[str, str]) -> None:
        self.facts = facts
        self.paths = paths
        self.failed: Record | None = None
        try:
            self.worker = Worker(job, threads)
        except Exception as error:
            self.failed = failure(error)

    def __call__(self, batch: Any) -> Any:
        import pyarrow as pa

        return pa.table({"entry": [json.dumps(self.entry(**one)) for one in batch.to_pylist()]})

    def entry(self, name: str, input: str, digest: str, rows: str | None, failed: str | None) -> Record:
        if failed is not None:
            return json.loads(failed)
        if rows is None:
            return {"kept": name, "input": input, "texts_sha256": digest}
        return self.failed or self.written(Shard(name, input, [Row(*row) for row in json.loads(rows)]))

    def written(self, shard: Shard) -> Record:
        try:
            return self.worker.write(shard, self.paths, self.facts)
        except Exception as error:
            return failure(error)
