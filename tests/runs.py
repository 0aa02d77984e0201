"""Commands run whole, here or in a process that may kill itself, and what they leave in a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from checkpoints import sentences
from typer.testing import CliRunner

import mlmfast
from mlmfast import cli

# A run that kills itself: in the middle of the n-th write to a shard or to the manifest, or after so many seconds.
DRIVER = """
import os, signal, sys, threading, time
from mlmfast import corpus, ledger, writers
from mlmfast.cli import main

corpus.WINDOW_ROWS = int(os.environ.get("WINDOW_ROWS", corpus.WINDOW_ROWS))
kind, _, count = os.environ.get("KILL", "").partition(":")
left = [float(count or 0)]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Torn:
    def __init__(self, stream):
        self.stream = stream
    def __getattr__(self, name):
        return getattr(self.stream, name)
    def write(self, content):
        left[0] -= 1
        if left[0] < 0 and content:
            self.stream.write(content[:random_cut(content)])
            self.stream.flush()
            die()
        return self.stream.write(content)

def random_cut(content):
    return int.from_bytes(os.urandom(4), "big") % len(content)

if kind == "shard":
    begin = writers.PartialFile.__init__
    def init(self, *arguments):
        begin(self, *arguments)
        self._stream = Torn(self._stream)
    writers.PartialFile.__init__ = init
elif kind == "manifest":
    write = ledger.Ledger._write
    def torn(self, records):
        self._stream, whole = Torn(self._stream), self._stream
        write(self, records)
        self._stream = whole
    ledger.Ledger._write = torn
elif kind == "settle":  # the file is whole, and has no name yet, or has it and no line in the manifest
    settle = writers.settle
    def dying(partial, target):
        left[0] -= 0.5
        if left[0] < 0:
            die()
        size = settle(partial, target)
        left[0] -= 0.5
        if left[0] < 0:
            die()
        return size
    writers.settle = dying
elif kind == "time":
    threading.Thread(target=lambda: (time.sleep(left[0]), die()), daemon=True).start()
main()
"""


def start(*arguments: str, code: str = DRIVER, **settings: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(mlmfast.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | settings
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def shards_of(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files_of(folder).items() if name.startswith("part-")}


def text_file(path: Path, rows: int) -> Path:
    path.write_text("\n".join(sentences(rows)) + "\n", encoding="utf-8")
    return path
