"""Whole runs of ``mlmfast score`` into a folder: rows a second and peak memory by the number of rows, local and on Ray.

    python benchmarks/corpus.py blimp.jsonl.gz --output benchmarks/results/corpus_tiny

The pairs of BLiMP's file (``sentence_good``, ``sentence_bad``) become rows of JSON Lines in four files of a folder. It
is scored from the start by each engine and number of rows, each in a process of its own: ``one process`` with two
threads, ``workers`` (two, a thread each) and ``ray`` (``ray.init(num_cpus=4)``, two actors, a thread each), in turn for
each number of rows. Seconds are those of the whole command, starting and loading included. Memory is the proportional
set size of all processes of a run together, sampled; Linux only. The shards of runs at one thread a worker are compared
byte for byte. Writes ``OUTPUT.json`` and ``OUTPUT.md`` after each run.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from record import machine_line, table, write

from mlmfast.bench import machine

MIB = 2**20
FILES = 4
SAMPLE_SECONDS = 0.5
LOCAL = "from mlmfast.cli import main; main()"
RAY = "import ray; ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level='ERROR')\n" + LOCAL
# Name -> code, flags, torch's threads (of each worker).
ENGINES: dict[str, tuple[str, list[str], int]] = {
    "one process": (LOCAL, [], 2),
    "workers": (LOCAL, ["--workers", "2"], 1),
    "ray": (RAY, ["--engine", "ray", "--workers", "2"], 1),
}


def sentences(pairs: Path) -> Iterator[str]:
    with gzip.open(pairs, "rt", encoding="utf-8") as stream:
        for line in stream:
            pair = json.loads(line)
            yield pair["sentence_good"]
            yield pair["sentence_bad"]


def write_rows(pairs: Path, rows: int, folder: Path) -> None:
    """So many rows, in a few files of consecutive ones."""
    folder.mkdir()
    texts = sentences(pairs)
    for number in range(FILES):
        with (folder / f"{number}.jsonl").open("w", encoding="utf-8") as stream:
            for text in islice(texts, rows * (number + 1) // FILES - rows * number // FILES):
                stream.write(json.dumps({"text": text}) + "\n")


def family(process: int) -> list[int]:
    """A process, first, and all below it."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [process]
    for one in found:
        found += parents.get(one, [])
    return found


def held(process: int) -> int:
    """Bytes of a process: its own, and its part of what it shares with others."""
    try:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:  # it has ended
        return 0
    return sum(int(number) << 10 for number in re.findall(r"^Pss: +(\d+)", rollup, re.MULTILINE))


def run(engine: str, source: Path, output: Path, shard_rows: int) -> dict[str, Any]:
    code, flags, threads = ENGINES[engine]
    arguments = ["score", str(source), "--model", "tiny", "--output", f"{output}/", "--shard-rows", str(shard_rows)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments, *flags], env=environment, stderr=subprocess.PIPE, text=True
    )
    peaks = {"all": 0, "largest": 0, "first": 0}
    done = threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            found = [held(process) for process in family(process.pid)]
            peaks["first"] = max(peaks["first"], found[0])
            peaks["largest"] = max(peaks["largest"], *found)
            peaks["all"] = max(peaks["all"], sum(found))

    sampler = threading.Thread(target=sample)
    sampler.start()
    _, said = process.communicate()
    seconds = time.perf_counter() - begin
    done.set()
    sampler.join()
    if process.returncode:
        raise SystemExit(f"{engine}: {said}")
    shards = sorted(output.glob("part-*.jsonl"))
    digest = hashlib.sha256(b"".join(hashlib.sha256(one.read_bytes()).digest() for one in shards)).hexdigest()
    computing = float(re.findall(r"scored in ([\d.]+) s", said)[0])
    return {
        "seconds": seconds,
        "computing_seconds": computing,
        "peaks": peaks,
        "shards": len(shards),
        "bytes": sum(one.stat().st_size for one in shards),
        "sha256": digest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--rows", default="1000,10000,120000", help="commas between")
    parser.add_argument("--engines", default=",".join(ENGINES), help=f"of {', '.join(ENGINES)}; commas between")
    parser.add_argument("--rounds", default="3,3,1", help="runs of each engine, for each number of rows")
    parser.add_argument("--shard-rows", type=int, default=1000)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    header = machine.describe()
    cases: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for rows, rounds in zip(map(int, options.rows.split(",")), map(int, options.rounds.split(","))):
            source = Path(scratch, f"rows-{rows}")
            write_rows(options.pairs, rows, source)
            for turn in range(rounds):
                engines = options.engines.split(",")
                for engine in engines[:: -1 if turn % 2 else 1]:
                    output = Path(scratch, "out")
                    found = run(engine, source, output, options.shard_rows)
                    shutil.rmtree(output)
                    cases.append({"rows": rows, "engine": engine, "round": turn} | found)
                    print(json.dumps(cases[-1]), file=sys.stderr, flush=True)
                    result = {"header": header, "shard_rows": options.shard_rows, "cases": cases}
                    write(options.output, result, page(header, options.shard_rows, cases))


def page(header: dict[str, Any], shard_rows: int, cases: list[dict[str, Any]]) -> list[str]:
    lines = []
    for rows in dict.fromkeys(case["rows"] for case in cases):
        these = [case for case in cases if case["rows"] == rows]
        single = {case["sha256"] for case in these if ENGINES[case["engine"]][2] == 1}
        for engine in dict.fromkeys(case["engine"] for case in these):
            own = [case for case in these if case["engine"] == engine]
            seconds = statistics.median(case["seconds"] for case in own)
            computing = statistics.median(case["computing_seconds"] for case in own)
            peaks = [max(case["peaks"][name] for case in own) / MIB for name in ("all", "first", "largest")]
            equal = "-" if ENGINES[engine][2] != 1 else "yes" if len(single) == 1 else "**no**"
            figures = [f"{seconds:.0f}", f"{rows / seconds:.1f}", f"{rows / computing:.1f}"]
            figures += [f"{peak:,.0f}" for peak in peaks]
            lines.append([f"{rows:,} rows, {engine}", str(len(own)), *figures, equal])
    head = ["", "runs", "seconds", "rows/s", "rows/s, as the command counts", "MiB, all processes"]
    head += ["MiB, the first process", "MiB, the largest", "equal bytes at a thread each"]
    return [
        "# Whole runs into a folder",
        "",
        f"`mlmfast score FOLDER --model tiny --output OUT/ --shard-rows {shard_rows}`: {machine_line(header)}",
        "",
        *table(head, lines),
        "",
        "Seconds are medians of whole commands, starting Python and loading the model included. Memory is the peak of "
        "proportional set sizes, sampled twice a second.",
    ]


if __name__ == "__main__":
    main()
