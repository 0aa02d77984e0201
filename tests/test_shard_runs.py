"""Whole runs into folders: killed anywhere, in several processes, short of memory or of disk."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import sentences
from runs import files_of, invoke, shards_of, start, text_file

import mlmfast
from mlmfast import corpus, workers
from mlmfast.errors import MLMFastError
from mlmfast.shards import ShardFolder


@pytest.fixture
def model(bert_folder: Path) -> str:
    return str(bert_folder)


@pytest.fixture(autouse=True)
def one_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what has been measured on this machine: the same for all processes of a test, and not the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


# ---- killed


@pytest.mark.parametrize("kill", ["shard:3", "manifest:3", "settle:1", "settle:1.5"])
def test_a_killed_run_leaves_what_the_next_one_needs(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill: str
) -> None:
    source = str(text_file(tmp_path / "corpus.txt", 60))
    monkeypatch.setattr(corpus, "WINDOW_ROWS", 8)
    command = ["score", source, "--model", model, "--shard-rows", "20", "--output"]
    assert invoke(*command, f"{tmp_path}/whole/").exit_code == 0
    died = start(*command, f"{tmp_path}/out/", KILL=kill, WINDOW_ROWS="8")
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert (tmp_path / "out" / "_manifest").exists()
    again = invoke(*command, f"{tmp_path}/out/")
    assert again.exit_code == 0 and "by an earlier run" in again.stderr, again.stderr
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.slow
def test_twenty_kills(model: str, tmp_path: Path) -> None:
    """20,000 rows in twelve shards, killed at twenty random moments."""
    source = str(text_file(tmp_path / "corpus.txt", 20_000))
    command = ["score", source, "--model", model, "--shard-rows", "1700", "--quiet", "--output"]
    assert start(*command, f"{tmp_path}/whole/").returncode == 0
    assert len(shards_of(tmp_path / "whole")) == 12
    draw = random.Random(0)
    kinds = [*(["shard"] * 8), *(["manifest"] * 6), *(["settle"] * 3), *(["time"] * 3)]
    draw.shuffle(kinds)
    for kind in kinds:
        died = False
        while not died:
            counts = {"time": draw.uniform(2, 5), "settle": draw.choice([0, 0.5, 1])}
            ran = start(*command, f"{tmp_path}/out/", KILL=f"{kind}:{counts.get(kind, draw.randrange(2))}")
            died = ran.returncode == -signal.SIGKILL
            if not died:  # a fast machine has finished before that moment: once more from the beginning
                assert ran.returncode == 0, ran.stderr
                assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
                shutil.rmtree(tmp_path / "out")
    assert start(*command, f"{tmp_path}/out/").returncode == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


# ---- several processes


def test_workers_write_what_one_process_writes(model: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, rows in (("a.txt", 25), ("b.txt", 3)):
        text_file(folder / name, rows)
    (folder / "b.txt").write_bytes((folder / "b.txt").read_bytes() + b"\n\xff\n")  # an empty row, and one not UTF-8
    command = ["score", str(folder), "--model", model, "--shard-rows", "10", "--output"]
    one = start(*command, f"{tmp_path}/one/")
    assert one.returncode == 1 and "30 rows, 2 with an error" in one.stderr, one.stderr
    two = start(*command, f"{tmp_path}/two/", "--workers", "2")
    assert two.returncode == 1 and "30 rows, 2 with an error" in two.stderr, two.stderr
    assert shards_of(tmp_path / "one") == shards_of(tmp_path / "two")
    assert list(shards_of(tmp_path / "one")) == [
        *(f"part-00000-{i:05d}.jsonl" for i in range(3)),
        "part-00001-00000.jsonl",
    ]
    records = [json.loads(line) for line in (tmp_path / "two" / "part-00001-00000.jsonl").read_text().splitlines()]
    errors = [record["error"] for record in records if "error" in record]
    assert errors[0].startswith("row 4 of b.txt has no token to score: it is empty")
    assert errors[1].startswith("row 5 of b.txt is not UTF-8")
    again = start(*command, f"{tmp_path}/two/")
    assert "30 rows (30 of them by an earlier run)" in again.stderr, again.stderr


def test_what_workers_cannot_do_is_said(model: str, tmp_path: Path) -> None:
    source = str(text_file(tmp_path / "corpus.txt", 5))
    for options, said in (
        (["--workers", "2"], "end --output in /"),
        (["--engine", "ray", "--output", f"{tmp_path}/out.jsonl"], "end --output in /"),
        (["--engine", "spark"], "choose local or ray"),
    ):
        found = invoke("score", source, "--model", model, *options)
        assert found.exit_code == 2 and said in found.stderr
    missing = start("score", source, "--model", "no/such", "--workers", "2", "--output", f"{tmp_path}/out/")
    assert missing.returncode == 2 and missing.stderr.startswith("mlmfast: no/such"), missing.stderr
    assert not (tmp_path / "out").exists()


DYING_WORKER = """
import os, sys
if __name__ == "__main__":
    from mlmfast.cli import main
    main()
else:  # in a worker, which spawn gives this file
    from mlmfast import workers
    write = workers.Worker.write
    def dying(self, shard, *arguments):
        if shard.name == "part-00002":
            os.kill(os.getpid(), 9)
        return write(self, shard, *arguments)
    workers.Worker.write = dying
"""


def test_a_worker_that_dies_ends_the_run_and_keeps_the_rest(model: str, tmp_path: Path) -> None:
    source = str(text_file(tmp_path / "corpus.txt", 60))
    (tmp_path / "dying.py").write_text(DYING_WORKER)
    command = ["score", source, "--model", model, "--shard-rows", "20", "--output"]
    environment = os.environ | {"PYTHONPATH": str(Path(mlmfast.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    died = subprocess.run(
        [sys.executable, str(tmp_path / "dying.py"), *command, f"{tmp_path}/out/", "--workers", "2"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert died.returncode == 2, died.stderr
    assert "a worker died" in died.stderr and "--workers" in died.stderr
    assert "part-00002" not in (tmp_path / "out" / "_manifest").read_text()
    assert start(*command, f"{tmp_path}/out/").returncode == 0
    assert start(*command, f"{tmp_path}/whole/").returncode == 0
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "whole")


def test_generate_with_workers_writes_what_one_process_writes(tmp_path: Path) -> None:
    source = str(text_file(tmp_path / "prompts.txt", 24))
    command = ["generate", "--file", source, "--sample", "--max-new-tokens", "3", "--shard-rows", "5", "--output"]
    for name, more in (("one", []), ("two", ["--workers", "2"])):
        found = start(*command, f"{tmp_path}/{name}/", *more)
        assert found.returncode == 0 and "24 rows, 0 with an error" in found.stderr, found.stderr
    assert len(shards_of(tmp_path / "one")) == 5 and shards_of(tmp_path / "one") == shards_of(tmp_path / "two")


def test_a_pool_leaves_other_processes_alone(model: str, tmp_path: Path) -> None:
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    other.start()
    try:
        folder = ShardFolder(tmp_path / "out", {}, 10)
        job = corpus.Job("no/such", {}, {})
        with pytest.raises(MLMFastError, match="no/such"), workers.in_processes(folder, job, 1, advance=print):
            pass
        folder.close()
        assert other.is_alive()
    finally:
        other.kill()


@pytest.mark.parametrize(("threads", "expected"), [(1, 1), (1 << 10, None)])
def test_workers_take_no_more_threads_than_torch_has(
    monkeypatch: pytest.MonkeyPatch, threads: int, expected: int | None
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert workers.cores_of(1) == (expected or cores)
    assert workers.cores_of(1 << 10) == 1


# ---- inputs that change, are missing, or lie beside the output


def test_a_folder_that_grows_is_gone_on_with(model: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    text_file(tmp_path / "in" / "b.txt", 12)
    command = ["score", f"{tmp_path}/in", "--model", model, "--shard-rows", "5", "--output"]
    assert invoke(*command, f"{tmp_path}/out/").exit_code == 0
    text_file(tmp_path / "in" / "c.txt", 4)
    grown = invoke(*command, f"{tmp_path}/out/")
    assert grown.exit_code == 0 and "16 rows (12 of them by an earlier run)" in grown.stderr, grown.stderr
    text_file(tmp_path / "in" / "a.txt", 4)
    pushed = invoke(*command, f"{tmp_path}/out/")
    assert pushed.exit_code == 2 and "was made from b.txt, and a.txt is in its place now" in pushed.stderr


def test_an_output_may_lie_in_its_input(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the same command, wherever it is given, continues it."""
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    text_file(Path("in/a.txt"), 12)
    command = ["score", "in", "--model", model, "--output", "in/scores/"]
    assert invoke(*command).exit_code == 0
    before = files_of(Path("in/scores"))
    monkeypatch.chdir(tmp_path / "in")
    again = invoke("score", str(tmp_path / "in"), "--model", model, "--output", "scores/")
    assert again.exit_code == 0 and "12 rows (12 of them by an earlier run)" in again.stderr, again.stderr
    assert files_of(tmp_path / "in/scores") == before


def test_a_missing_input_leaves_nothing(model: str, tmp_path: Path) -> None:
    missing = invoke("score", f"{tmp_path}/none.txt", "--model", model, "--output", f"{tmp_path}/out/")
    assert missing.exit_code == 2 and "none.txt" in missing.stderr and list(tmp_path.iterdir()) == []
    fasta = invoke("esm", "pppl", f"{tmp_path}/none.fasta", "--model", model, "--output", f"{tmp_path}/out/")
    assert fasta.exit_code == 2 and "none.fasta" in fasta.stderr and list(tmp_path.iterdir()) == []


def test_an_empty_input_is_a_finished_run(model: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    for _ in range(2):
        command = ["score", f"{tmp_path}/empty.txt", "--model", model, "--output", f"{tmp_path}/out/"]
        found = invoke(*command, "--html", f"{tmp_path}/page.html")
        assert found.exit_code == 0 and "0 rows, 0 with an error" in found.stderr, found.stderr
    assert list(files_of(tmp_path / "out")) == ["_manifest"] and (tmp_path / "page.html").exists()


def test_a_model_that_cannot_be_read_is_no_matter_of_the_output(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: Any, **options: Any) -> Any:
        raise OSError(5, "Input/output error", "weights")

    monkeypatch.setattr(mlmfast, "load", load)
    found = invoke("score", str(text_file(tmp_path / "a.txt", 3)), "--model", model, "--output", f"{tmp_path}/out/")
    assert found.exit_code == 2 and "weights" in found.stderr and "cannot write" not in found.stderr


def test_what_cannot_be_asked_leaves_nothing(model: str, tmp_path: Path) -> None:
    source = str(text_file(tmp_path / "a.txt", 3))
    found = invoke("score", source, "--model", model, "--engine", "spark", "--output", f"{tmp_path}/out/")
    assert found.exit_code == 2 and not (tmp_path / "out").exists()


def test_what_products_leave_behind_is_bounded(model: str, tmp_path: Path) -> None:
    """Before the first of them; but not against the user's own setting."""
    code = "import mlmfast, os\nfrom mlmfast import workers\nfrom mlmfast.cli import main\nload = mlmfast.load\n"
    code += "def told(*arguments, **options):\n    print([os.environ.get(name) for name in workers.PREPARED])\n"
    code += "    return load(*arguments, **options)\nmlmfast.load = told\nmain()"
    command = ["score", str(text_file(tmp_path / "a.txt", 3)), "--model", model, "--output", f"{tmp_path}/out.jsonl"]
    assert start(*command, code=code).stdout == "['128', '128']\n"
    assert start(*command, code=code, LRU_CACHE_CAPACITY="7").stdout == "['7', '128']\n"


def test_other_threads_are_told(model: str, tmp_path: Path) -> None:
    command = ["score", str(text_file(tmp_path / "a.txt", 3)), "--model", model, "--output", f"{tmp_path}/out/"]
    assert "begun with" not in start(*command).stderr
    assert (
        f"{tmp_path}/out/ was begun with threads 1, now 2: last digits may differ"
        in start(*command, OMP_NUM_THREADS="2").stderr
    )


# ---- short of memory or of disk

SHORT_OF_MEMORY = """
import resource, sys
import mlmfast, torch
from mlmfast import cli, workers
from mlmfast.model import MaskedLM
score, room = MaskedLM.score, int(sys.argv.pop())
def limited(self, texts, **options):
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    now = int(status["VmSize"].split()[0]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (now + (room << 20), resource.RLIM_INFINITY))
    MaskedLM.score = score
    return score(self, texts, **options)
if room:
    MaskedLM.score = limited
from mlmfast import execution
halves, calls = execution.halves, []
execution.halves = lambda batch: calls.append(batch) or halves(batch)
try:
    cli.main()
finally:
    print("halved", len(calls))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="an address space is limited as Linux does it")
def test_too_little_memory_halves_batches(tmp_path: Path) -> None:
    """With room for a fraction of a batch of 60,000 tokens, the same scores come out.

    glibc would keep what failed batches have freed, and even a single copy would find no memory: see make_room.
    """
    source = str(text_file(tmp_path / "corpus.txt", 400))
    command = ["score", source, "--model", "tiny", "--batch-tokens", "60000", "--backend", "reference", "--output"]
    found = {}
    for name, room in (("plenty", "0"), ("short", "200")):
        ran = start(*command, f"{tmp_path}/{name}/", room, code=SHORT_OF_MEMORY)
        assert ran.returncode == 0, ran.stderr[-2000:]
        lines = (tmp_path / name / "part-00000.jsonl").read_text().splitlines()
        found[name] = [json.loads(line)["pll"] for line in lines], int(ran.stdout.split()[-1])
    assert found["plenty"][1] == 0 < found["short"][1]
    assert found["short"][0] == pytest.approx(found["plenty"][0], rel=1e-5)


SHORT_OF_DISK = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
from mlmfast.cli import main
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sizes of files are limited as POSIX does it")
@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_a_full_disk_is_said_and_nothing_is_lost(model: str, tmp_path: Path, format: str) -> None:
    """Files may not grow beyond 6,000 bytes: as on a full disk, a write fails half-way."""
    texts = sentences(60)
    texts[20:] = [text * 40 for text in texts[20:]]  # the first shard fits, the second does not
    (tmp_path / "corpus.txt").write_text("\n".join(texts) + "\n")
    command = ["score", str(tmp_path / "corpus.txt"), "--model", model, "--truncation", "right", "--shard-rows", "10"]
    command += ["--output-format", format, "--output"]
    full = start(*command, f"{tmp_path}/out/", code=textwrap.dedent(SHORT_OF_DISK))
    assert full.returncode == 2, full.stderr
    assert re.search(f"cannot write {tmp_path}/out/: .*File too large", full.stderr), full.stderr
    assert "Traceback" not in full.stderr
    kept = shards_of(tmp_path / "out")
    assert f"part-00000.{format}" in kept
    again = start(*command, f"{tmp_path}/out/")
    assert again.returncode == 0 and "by an earlier run" in again.stderr
    assert start(*command, f"{tmp_path}/whole/").returncode == 0
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "whole")
