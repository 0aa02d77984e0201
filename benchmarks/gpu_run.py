"""Steps within a budget, and a result that outlives whatever ends them: the machinery of ``gpu.py``.

The same command again continues: what is there is not done anew. A step that ends the process counts as failed the
next time, so that it is not tried for ever.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import table_cells
import torch

from mlmfast.errors import RequestError

LISTS = ("checks", "rows", "details", "ranking", "generation", "ops", "skipped", "failed", "not_run", "done")
# What may differ between two runs of one result, in the header and in its settings.
VARYING = ("time", "load", "copy_bandwidth", "matrix_rates", "continued")
# What the next machine of the kind may have otherwise, and the commit, which results committed in between change: what
# was measured is the sources, by their hash. Each continuation notes its own.
NOTED = ("time", "load", "commit", "cpu", "cores", "threads", "instructions", "system")
VARYING_SETTINGS = ("budget", "anew", "retry")


@dataclass(frozen=True)
class Step:
    """Something to run if there is time; it returns what it adds to the lists of the result.

    Attributes:
        name: its own, by which a result knows it again.
        seconds: that it may take, guessed.
    """

    name: str
    seconds: float
    run: Callable[[], dict[str, list[Any]]]


@dataclass
class Result:
    """What is written, anew before and after every step: by renaming, so that no reader and no kill ever meets half a
    file.

    Attributes:
        lists: ``checks`` and ``ops`` of :mod:`bench_ops` and what it ``skipped``; ``rows`` and ``details`` as ``mlmfast
            bench pll`` has them; rows of ``ranking`` and ``generation`` with their details inside; steps that
            ``failed`` with the reason, names of those ``not_run`` and of those ``done``.
        running: the name of the step that has begun.
    """

    path: Path
    header: dict[str, Any]
    lists: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in LISTS})
    running: str | None = None

    @classmethod
    def opened(cls, path: Path, header: dict[str, Any], *, anew: bool = False, retry: bool = False) -> Result:
        """The result that is at ``path`` already, to be continued; a new one where there is none.

        Args:
            anew: replaces what is there.
            retry: forgets what failed, so that it runs again.

        Raises:
            RequestError: what is there was measured by other code, elsewhere or otherwise.
        """
        if anew or not path.exists():
            return cls(path, header)
        there = json.loads(path.read_text(encoding="utf-8"))
        before, now = (lasting(one) for one in (there["header"], json.loads(json.dumps(finite(header)))))
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                raise RequestError(
                    f"{path} was measured with {name} {before.get(name)!r}, and now it is {now.get(name)!r}: "
                    "--name NAME writes another file, --anew replaces this one"
                )
        lists = {name: there.get(name, []) for name in LISTS} | {"not_run": []}
        if there.get("running"):
            lists["failed"].append({"step": there["running"], "reason": "the process ended in this step"})
        if retry:
            lists["failed"] = []
        kept = there["header"]
        kept["continued"] = [*kept.get("continued", []), {name: header[name] for name in NOTED if name in header}]
        kept["copy_bandwidth"] = max(kept["copy_bandwidth"], header["copy_bandwidth"])
        return cls(path, kept, lists)

    @property
    def known(self) -> set[str]:
        """Names of the steps that need not run."""
        return {*self.lists["done"], *(failed["step"] for failed in self.lists["failed"])}

    def add(self, found: dict[str, list[Any]]) -> None:
        for name, items in found.items():
            self.lists[name] += items
        self.write()

    def write(self, finished: bool = False) -> None:
        whole = finite({"header": self.header, **self.lists, "running": self.running, "finished": finished})
        beside = self.path.with_name(self.path.name + ".new")
        beside.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(beside, self.path)

    @property
    def agrees(self) -> bool:
        rows = self.lists["checks"] + self.lists["details"] + self.lists["ops"]
        rows += [row["details"] for name in ("ranking", "generation") for row in self.lists[name]]
        return all(row["agrees"] for row in rows) and not self.lists["failed"]


def lasting(header: dict[str, Any]) -> dict[str, Any]:
    """What two runs of one result have in common."""
    found = {name: value for name, value in header.items() if name not in (*VARYING, *NOTED, "settings")}
    if "device" in found:  # which may have a little more memory or less, by the driver
        found["device"] = {name: value for name, value in found["device"].items() if name != "memory_bytes"}
    settings = header.get("settings", {}).items()
    return found | {f"the setting {name}": value for name, value in settings if name not in VARYING_SETTINGS}


def finite(value: Any) -> Any:
    """The same with None for NaN and infinities, which JSON has not."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def carry_out(todo: Iterator[Step], result: Result, budget: float) -> None:
    """Runs steps while there is time for them; a step that fails is noted, and the next one runs.

    A failure that has taken the device with it ends the run: a process gets no second context.

    Args:
        todo: what to run, in order; what the result knows is left out.
        result: takes what they find, and what was not run.
        budget: seconds.
    """
    start, known, lost = time.monotonic(), result.known, False
    for step in todo:
        if step.name in known:
            continue
        if lost or time.monotonic() - start + step.seconds > budget:
            result.lists["not_run"].append(step.name)
            continue  # a shorter one may still fit
        result.running = step.name
        result.write()
        try:
            found = step.run() | {"done": [step.name]}
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
            found = {"failed": [{"step": step.name, "reason": reason}]}
        lost = device_lost()  # a failing row of a step may have done it, too
        gc.collect()
        if torch.cuda.is_available() and not lost:
            torch.cuda.empty_cache()
        result.running = None
        result.add(found)
        say(f"[{time.monotonic() - start:4.0f} s] {step.name}: {summed_up(found)}")
        if lost:
            say("the device computes no more for this process; the same command again goes on after this step")
    result.write()


def device_lost() -> bool:
    """Whether an error has left the GPU unusable for this process, as an illegal address does."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def summed_up(found: dict[str, list[Any]]) -> str:
    """A step in a line."""
    if "failed" in found:
        return f"failed: {found['failed'][0]['reason']}"
    if "checks" in found:
        wrong = [f"{c['op']} {c['dtype']} {c['case']}" for c in found["checks"] if not c["agrees"]]
        return f"{len(found['checks'])} checked, wrong or failed: {'; '.join(wrong) or 'none'}"
    if "ops" in found:
        skipped = [f"{row['backend']} skipped" for row in found["skipped"]]
        return ", ".join([*(op_line(row) for row in found["ops"]), *skipped])
    if "generation" in found:
        return ", ".join(side_line(row) for row in found["generation"])
    if "ranking" in found:
        return "; ".join(f"{row['peer']} {ratio_of(row, row['details'])}" for row in found["ranking"])
    rows = list(zip(found["rows"], found["details"]))
    told_rows = [f"{row['peer']} {ratio_of(row, details)}" for row, details in rows]
    return f"{rows[0][0]['copies']} copies, {', '.join(told_rows)}"


def ratio_of(row: dict[str, Any], details: dict[str, Any]) -> str:
    """``"2.50x"``, or why there is none."""
    return f"{row['ratio']:.2f}x" if row["ratio"] else table_cells.refusal(details)


def side_line(row: dict[str, Any]) -> str:
    """A side's milliseconds a token."""
    if row["seconds_token"] is None:
        return f"{row['side']} {table_cells.refusal(row['details'])}"
    return f"{row['side']} {row['seconds_token'] * 1e3:.2f} ms"


def op_line(row: dict[str, Any]) -> str:
    """An op's time by one backend, and the nearer of its two bounds."""
    if "seconds" not in row:
        return f"{row['backend']} {table_cells.refusal(row)}"
    products, copies = row["of_matrix_rate"], row["of_copy_bandwidth"]
    near = f"{products:.0%} of products" if products > copies else f"{copies:.0%} of a copy"
    return f"{row['backend']} {row['seconds'] * 1e6:.1f} us, {near}"


def say(line: str) -> None:
    """To stderr, at once."""
    print(line, file=sys.stderr, flush=True)
