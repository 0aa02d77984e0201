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
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from mlmfast.corpus import Job
from mlmfast.errors import MLMFastError, RequestError
from mlmfast.readers import Row, read_rows
from mlmfast.shards import Shard, ShardFolder, shards_of
from mlmfast.workers import Advance, Computing, Worker, cores_of
from mlmfast.writers import Record, Tally

# Cores of a Ray that is started here for what reads: actors that hold all of them would wait for their rows for ever.
READERS = 2


@contextmanager
def in_ray(
    folder: ShardFolder, job: Job, workers: int, files: Sequence[str], format: str, field: str, *, advance: Advance
) -> Iterator[Computing]:
    """Computes shards by actors of Ray Data, each with a model, on a GPU of its own or a part of a machine's cores.

    A Ray that is running (``RAY_ADDRESS``, or :func:`ray.init` before this) is used; else one is started here. An actor
    that dies is started anew by Ray, and its shard is done again.

    Args:
        folder: of all machines; its manifest is written here.
        job: what is done.
        workers: actors.
        files, format, field: of :func:`mlmfast.readers.read_rows`.
        advance: told the counts of every shard.

    Raises:
        RequestError: there is no Ray.
        MLMFastError: as the local engine does.
    """
    ray = imported()
    threads = cores_of(workers)
    started = not ray.is_initialized()
    if started:
        quiet = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        address = os.environ.get("RAY_ADDRESS")
        here = {"num_cpus": threads * workers + READERS} if address is None else {"address": address}
        ray.init(**here, **quiet)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        # A shard is a block, however small: what one task has read is shared out.
        context.target_min_block_size = context.target_max_block_size = 1
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells of every step it takes
        needs: dict[str, Any] = {"num_cpus": threads}
        if job.loading.get("device", "auto") in ("auto", "cuda") and ray.cluster_resources().get("GPU"):
            needs |= {"num_gpus": 1}
        facts = folder.agree(plain(lambda: ray.get(ray.remote(**needs)(facts_there).remote(job, threads))))
        known = folder.finished()

        def shards(ignored: Any) -> Iterator[Record]:
            source = datasource(files, format, field, folder.shard_rows, known)
            found = ray.data.read_datasource(source, override_num_blocks=len(files)).map_batches(
                Scorer,
                fn_constructor_args=(job, threads, facts, folder.paths()),
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=workers),
                **needs,
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of fewer files than actors
                rows = plain(lambda: iter(found.iter_rows()))
            while (row := plain(lambda: next(rows, None))) is not None:
                entry = json.loads(row["entry"])
                if "kept" in entry:
                    kept = folder.verified(entry["kept"], entry["texts_sha256"])
                    assert kept is not None  # damaged ones are not among the known
                    advance(Tally.of_entry(kept, kept=True))
                else:
                    advance(Tally.of_entry(entry))
                    yield entry

        yield Computing(facts["generic"], shards=shards, reads=True)
    finally:
        if started:
            ray.shutdown()


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


def plain(compute: Callable[[], Any]) -> Any:
    """A value, or the error of this package that Ray has wrapped into its own."""
    from ray.exceptions import RayError

    try:
        return compute()
    except RayError as error:
        cause: BaseException | None = error
        # Ray's own error is of both kinds: what it wraps is looked for.
        while cause is not None and (isinstance(cause, RayError) or not isinstance(cause, MLMFastError)):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is not None:
            raise cause from None
        raise MLMFastError(f"Ray gave up: {str(error).strip().splitlines()[-1]}") from error


def facts_there(job: Job, threads: int) -> Record:
    """What a manifest keeps of the model as an actor loads it."""
    return Worker(job, threads).facts()


def datasource(files: Sequence[str], format: str, field: str, shard_rows: int, known: dict[str, str]) -> Any:
    """A datasource of Ray's: a task a file, a row a shard, with its rows as JSON."""
    import pyarrow as pa
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    several = len(files) > 1
    resolved = [str(Path(file).resolve()) for file in files]

    def read(number: int) -> Iterator[Any]:
        rows = read_rows(resolved[number], format=format, field=field, several=several)
        before = [(file, ()) for file in files[:number]]  # so that the names count
        for shard in shards_of([*before, (files[number], rows)], shard_rows, several=several):
            digest = shard.digest()
            content = None
            if shard.name not in known:
                content = json.dumps([[row.index, row.text, row.error, row.input] for row in shard.rows])
            columns = {"name": shard.name, "input": shard.input, "digest": digest, "rows": content}
            yield pa.table({name: pa.array([value], pa.string()) for name, value in columns.items()})

    class Shards(Datasource):
        def get_read_tasks(self, parallelism: int, *arguments: Any, **options: Any) -> list[Any]:
            nothing = {"num_rows": None, "size_bytes": None, "exec_stats": None}
            return [
                ReadTask(partial(read, number), BlockMetadata(**nothing, input_files=(file,)))
                for number, file in enumerate(files)
            ]

        def estimate_inmemory_data_size(self) -> int | None:
            return None

    return Shards()


class Scorer:
    """An actor: shards -> lines of the manifest, their files written on the way."""

    def __init__(self, job: Job, threads: int, facts: Record, paths: tuple[str, str]) -> None:
        self.worker = Worker(job, threads)
        self.facts = facts
        self.paths = paths

    def __call__(self, batch: Any) -> Any:
        import pyarrow as pa

        entries = []
        for one in batch.to_pylist():
            if one["rows"] is None:
                entry = {"kept": one["name"], "texts_sha256": one["digest"]}
            else:
                shard = Shard(one["name"], one["input"], [Row(*row) for row in json.loads(one["rows"])])
                entry = self.worker.write(shard, self.paths, self.facts)
            entries.append(json.dumps(entry))
        return pa.table({"entry": entries})
