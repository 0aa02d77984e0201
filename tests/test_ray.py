"""Shards on Ray: those of one process, whatever room there is and whoever dies."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tqdm
from runs import invoke, shards_of, start, text_file

from mlmfast import corpus, ray_engine, writers
from mlmfast.errors import MLMFastError
from mlmfast.workers import Computing
from mlmfast.writers import Tally


@pytest.fixture(scope="module", autouse=True)
def one_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of what has been measured on this machine: the same for all processes, actors among them, and not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(scope="module")
def ray(one_cache: None) -> Iterator[Any]:
    """As many CPUs as two actors hold, so that none is left for what reads."""
    found = pytest.importorskip("ray", reason='pip install "mlmfast[ray]"')
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    found.init(address="local", num_cpus=2, num_gpus=0, **quiet)
    yield found
    found.shutdown()


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each actor, on whatever machine."""
    monkeypatch.setattr(ray_engine, "cores_of", lambda workers: 1)


@pytest.fixture
def model(bert_folder: Path) -> str:
    return str(bert_folder)


def test_ray_writes_what_one_process_writes(ray: Any, model: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, rows in (("a.txt", 45), ("b.txt", 7)):
        text_file(folder / name, rows)
    command = ["score", str(folder), "--model", model, "--shard-rows", "10", "--output"]
    assert start(*command, f"{tmp_path}/one/").returncode == 0
    found = invoke(*command, f"{tmp_path}/ray/", "--engine", "ray", "--workers", "2")
    assert found.exit_code == 0 and "52 rows, 0 with an error" in found.stderr, found.stderr
    assert shards_of(tmp_path / "ray") == shards_of(tmp_path / "one")
    lost = tmp_path / "ray" / "part-00000-00001.jsonl"
    lost.unlink()
    again = invoke(*command, f"{tmp_path}/ray/", "--engine", "ray")
    assert "52 rows (42 of them by an earlier run)" in again.stderr, again.stderr
    assert shards_of(tmp_path / "ray") == shards_of(tmp_path / "one")


def test_a_changed_input_is_refused_where_a_shard_is_lost_too(ray: Any, model: str, tmp_path: Path) -> None:
    source = text_file(tmp_path / "corpus.txt", 20)
    command = ["score", str(source), "--model", model, "--shard-rows", "10", "--output", f"{tmp_path}/out/"]
    assert start(*command).returncode == 0
    source.write_text(source.read_text().replace(".", "!", 1))
    (tmp_path / "out" / "part-00000.jsonl").unlink()
    manifest = (tmp_path / "out" / "_manifest").read_bytes()
    changed = invoke(*command, "--engine", "ray")
    assert changed.exit_code == 2 and "part-00000.jsonl was made from other rows" in changed.stderr, changed.stderr
    assert (tmp_path / "out" / "_manifest").read_bytes() == manifest
    assert list(shards_of(tmp_path / "out")) == ["part-00001.jsonl"]


def test_continuations_by_more_actors_than_there_is_room_for(
    ray: Any, bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a model whose path is relative to a folder where no actor is."""
    source = text_file(tmp_path / "corpus.txt", 12)
    monkeypatch.chdir(bert_folder.parent)
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars, context.target_min_block_size, context.target_max_block_size
    command = ["generate", "--file", str(source), "--model", bert_folder.name, "--max-new-tokens", "4"]
    command += ["--shard-rows", "4", "--output"]
    assert start(*command, f"{tmp_path}/one/").returncode == 0
    found = invoke(*command, f"{tmp_path}/ray/", "--engine", "ray", "--workers", "3")
    assert found.exit_code == 0, found.stderr
    assert shards_of(tmp_path / "ray") == shards_of(tmp_path / "one") and len(shards_of(tmp_path / "one")) == 3
    begun = [json.loads((tmp_path / name / "_manifest").read_text().splitlines()[0]) for name in ("ray", "one")]
    assert begun[0] == begun[1]
    assert before == (context.enable_progress_bars, context.target_min_block_size, context.target_max_block_size)


def test_what_ray_cannot_do_is_said(ray: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(text_file(tmp_path / "corpus.txt", 5))
    command = ["score", source, "--engine", "ray", "--output", f"{tmp_path}/out/"]
    missing = invoke(*command, "--model", "no/such")
    assert missing.exit_code == 2 and missing.stderr.startswith("mlmfast: no/such"), missing.stderr
    no_gpu = invoke(*command, "--model", model, "--device", "cuda:1")
    assert no_gpu.exit_code == 2 and "--device cpu" in no_gpu.stderr, no_gpu.stderr
    monkeypatch.setattr(ray_engine, "cores_of", lambda workers: 3)
    no_room = invoke(*command, "--model", model)
    assert no_room.exit_code == 2, no_room.stderr
    assert "--workers 1 is to give each 3 CPUs and 0 GPUs" in no_room.stderr and "take more" in no_room.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("device", "gpus", "given"),
    [("auto", 0, ("auto", 0)), ("auto", 8, ("cuda", 1)), ("cuda:1", 8, ("cuda", 1)), ("cpu", 8, ("cpu", 0))],
)
def test_an_actor_has_one_gpu_and_knows_no_other(device: str, gpus: int, given: tuple[str, int]) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": True, "Resources": {"CPU": 8.0, "GPU": float(gpus)}}]
    cluster = SimpleNamespace(nodes=lambda: nodes)
    job, needs = ray_engine.placed(cluster, corpus.Job("tiny", {"device": device}, {}), 4, 2)
    assert (job.loading["device"], needs) == (given[0], {"num_cpus": 4, "num_gpus": given[1]})


# ---- dying and failing actors


def dying(deaths: Path, most: int) -> type:
    """An actor that dies when it has written a window of the third shard, so often."""

    class Dying(ray_engine.Scorer):
        def __init__(self, *arguments: Any) -> None:
            corpus.WINDOW_ROWS = 8
            super().__init__(*arguments)
            write = writers.PartialFile.write

            def torn(file: Any, records: Any) -> None:
                write(file, records)
                died = deaths.stat().st_size if deaths.exists() else 0
                if file.target.stem == "part-00002" and died < most:
                    with deaths.open("a") as stream:
                        stream.write("x")
                    os.kill(os.getpid(), signal.SIGKILL)

            writers.PartialFile.write = torn

    return Dying


def test_an_actor_that_dies_is_replaced(ray: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(text_file(tmp_path / "corpus.txt", 60))
    command = ["score", source, "--model", model, "--shard-rows", "20", "--output"]
    assert start(*command, f"{tmp_path}/one/", WINDOW_ROWS="8").returncode == 0
    monkeypatch.setattr(ray_engine, "Scorer", dying(tmp_path / "deaths", 1))
    found = invoke(*command, f"{tmp_path}/ray/", "--engine", "ray", "--workers", "2")
    assert found.exit_code == 0, found.stderr
    assert (tmp_path / "deaths").read_text() == "x"
    assert shards_of(tmp_path / "ray") == shards_of(tmp_path / "one")


def test_actors_that_always_die_end_the_run_and_keep_the_rest(
    ray: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(text_file(tmp_path / "corpus.txt", 60))
    command = ["score", source, "--model", model, "--shard-rows", "20", "--output"]
    monkeypatch.setattr(ray_engine, "Scorer", dying(tmp_path / "deaths", 100))
    monkeypatch.setattr(ray_engine, "RETRIES", 1)  # each takes as long as a model is loaded
    died = invoke(*command, f"{tmp_path}/out/", "--engine", "ray", "--workers", "1")
    assert died.exit_code == 2 and "worker of Ray died" in died.stderr and "--workers" in died.stderr, died.stderr
    assert (tmp_path / "deaths").read_text() == "xx"
    assert "part-00002" not in (tmp_path / "out" / "_manifest").read_text()
    again = start(*command, f"{tmp_path}/out/", WINDOW_ROWS="8")
    assert again.returncode == 0 and "60 rows (56 of them by an earlier run)" in again.stderr, again.stderr
    assert start(*command, f"{tmp_path}/one/", WINDOW_ROWS="8").returncode == 0
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "one")


def failing(error: Exception) -> type:
    class Failing(ray_engine.Scorer):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)

            def fail(*arguments: Any) -> None:
                raise error

            # Of this one actor only, which fails so as a full disk would make it fail.
            self.worker.write = fail  # type: ignore[method-assign]

    return Failing


def test_errors_of_an_actor_are_those_of_a_local_run(
    ray: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(text_file(tmp_path / "corpus.txt", 5))
    command = ["score", source, "--model", model, "--output", f"{tmp_path}/out/", "--engine", "ray"]
    monkeypatch.setattr(ray_engine, "Scorer", failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    full = invoke(*command)
    assert full.exit_code == 2 and f"cannot write {tmp_path}/out/: No space left" in full.stderr, full.stderr
    monkeypatch.setattr(ray_engine, "Scorer", failing(MLMFastError("there is not enough memory for a single row")))
    short = invoke(*command)
    assert short.exit_code == 2 and short.stderr.startswith("mlmfast: there is not enough memory"), short.stderr
    monkeypatch.setattr(ray_engine, "Scorer", failing(KeyError("weight")))
    defect = invoke(*command)
    assert isinstance(defect.exception, RuntimeError) and "KeyError: 'weight'" in str(defect.exception)


def test_a_file_that_a_reader_cannot_read_is_a_row_with_an_error(ray: Any, model: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nA cat.\n")
    (tmp_path / "b.csv").write_text("other\nA cat.\n")
    command = ["score", f"{tmp_path}/*.csv", "--model", model, "--output"]
    unread = invoke(*command, f"{tmp_path}/ray/", "--engine", "ray")
    assert unread.exit_code == 1 and "2 rows, 1 with an error" in unread.stderr, unread.stderr
    assert start(*command, f"{tmp_path}/one/").returncode == 1
    assert shards_of(tmp_path / "ray") == shards_of(tmp_path / "one")
    record = json.loads((tmp_path / "ray" / "part-00001-00000.jsonl").read_text())
    assert record["error"].startswith("row 1 of b.csv cannot be read: b.csv has no column 'text'")


def test_an_error_of_ray_without_a_message_is_told_by_its_name() -> None:
    exceptions = pytest.importorskip("ray.exceptions")

    def fail() -> None:
        raise exceptions.RayError

    with pytest.raises(MLMFastError, match="Ray gave up: RayError"):
        ray_engine.plain(fail)


# ---- this process


def test_another_ray_of_this_machine_is_not_joined(ray: Any, model: str, tmp_path: Path) -> None:
    """It would be by an ``init`` without an address, which refuses to be told CPUs then."""
    source = str(text_file(tmp_path / "corpus.txt", 5))
    folder = tempfile.mkdtemp(dir="/tmp")  # sockets lie in it, whose names may not be long
    try:
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text(ray.get_runtime_context().gcs_address)
        found = start(
            *("score", source, "--model", model, "--output", f"{tmp_path}/out/", "--engine", "ray"), RAY_TMPDIR=folder
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert found.returncode == 0 and "5 rows, 0 with an error" in found.stderr, found.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="open files are found as Linux lists them")
def test_nothing_is_read_here_while_actors_work(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So no file is open, and of how many rows there will be nothing is known."""
    pytest.importorskip("ray")
    source = text_file(tmp_path / "corpus.txt", 5)
    begun, opened = [], []

    @contextmanager
    def engine(*arguments: Any, advance: Any) -> Iterator[Computing]:
        opened.extend(os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd"))
        advance(Tally(rows=5))
        yield Computing(False, shards=lambda shards: iter(()))

    class Bar(tqdm.tqdm):  # type: ignore[type-arg]  # generic in its stubs only, not where it runs
        def __init__(self, *arguments: Any, **options: Any) -> None:
            begun.append(self)
            super().__init__(*arguments, **options | {"disable": False, "file": io.StringIO()})

    monkeypatch.setattr(ray_engine, "in_ray", engine)
    monkeypatch.setattr(tqdm, "tqdm", Bar)
    found = invoke("score", str(source), "--model", model, "--output", f"{tmp_path}/out/", "--engine", "ray")
    assert found.exit_code == 0, found.stderr
    assert len(opened) > 2 and str(source.resolve()) not in opened
    assert [(bar.n, bar.total) for bar in begun] == [(5, None)]
    unread = invoke("score", str(tmp_path / "none.csv"), "--output", f"{tmp_path}/no/", "--engine", "ray")
    assert unread.exit_code == 2 and "none.csv" in unread.stderr and not (tmp_path / "no").exists()
