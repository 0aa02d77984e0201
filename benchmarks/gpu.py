"""Everything measured on a GPU, by one command that needs torch, Triton and transformers, and no network.

    make gpu-bench PYTHON=python3

Correctness first: every op against float64. Then passes against peers, ranking, generation and the ops one by one,
what matters most first, until the budget is spent. ``RESULTS/<device>/NAME.json`` is written anew around every step, so
that whatever ends the run leaves what it had; the table and the figure come last. The same command again goes on with
what is not there yet. What was left out is listed, and can be asked for in a run of its own (``--shapes roberta-large
--parts rank,generate --name gpu_large``, say). Exit status: 0 all rows agree, 1 some disagree or failed, 2 the request
is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import figure
import torch
from gpu_run import Result, carry_out, say
from gpu_steps import COMPILED, LENGTHS, PARTS, PEERS, PROMPTS, SHAPE_NAMES, Measuring, missing, steps

from mlmfast import backends
from mlmfast.bench import machine, peers
from mlmfast.bench.generate import SIDES
from mlmfast.bench.pll import DTYPES, check_device
from mlmfast.bench.shapes import named
from mlmfast.bench.timing import full_float32
from mlmfast.bench.work import COPY_BYTES, copy_bandwidth
from mlmfast.errors import BackendError, RequestError

# Seconds that a repeat of a side may take: the copies of a case are cut until it does.
MOST_SECONDS = 0.5
# Rows of a case's copies together before that.
COPY_TOKENS = 65536


def header_of(arguments: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    """Where, with what and how."""
    settings = {name: value for name, value in vars(arguments).items() if name not in ("results", "commit")}
    settings |= {"pairs": arguments.rounds, "against": [peer for peer in arguments.peers if not missing(peer)]}
    absent = {peer: f"pip install {' '.join(missing(peer))}" for peer in arguments.peers if missing(peer)}
    kind = torch.device(arguments.device).type
    services = {d: {s.op: s.backend for s in backends.report(kind, DTYPES[d])} for d in arguments.dtypes}
    found = machine.describe(arguments.device) | {"settings": settings, "peers": peers.versions(settings["against"])}
    found["commit"] = found["commit"] or arguments.commit
    found["sources"] = machine.sources()
    return found | {"absent": absent, "copy_bandwidth": bandwidth, "services": services}


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = lambda text: [part.strip() for part in text.split(",") if part.strip()]  # noqa: E731
    numbers = lambda text: [int(part) for part in words(text)]  # noqa: E731
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds, imports not counted")
    parser.add_argument("--parts", type=words, default=list(PARTS), help="of pll, rank, generate, ops; commas between")
    parser.add_argument("--shapes", type=words, default=list(SHAPE_NAMES), help="most important first")
    parser.add_argument("--lengths", type=numbers, default=list(LENGTHS), help="tokens a copy, most important first")
    parser.add_argument("--dtypes", type=words, default=["bfloat16", "float32"], help="most important first")
    parser.add_argument("--peers", type=words, default=[*PEERS, *COMPILED], help="of `mlmfast bench pll --against`")
    parser.add_argument("--prompts", type=numbers, default=list(PROMPTS), help="tokens that are generated after")
    parser.add_argument("--new-tokens", type=int, default=64, help="that are generated")
    parser.add_argument("--sides", type=words, default=["window", "drafted"], help="of `bench generate`, beside exact")
    parser.add_argument("--backend", default="auto", help="of mlmfast's passes")
    parser.add_argument("--op-backends", type=words, help="cuda if loaded, triton, reference; on a CPU cpu, reference")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved")
    parser.add_argument("--copy-tokens", type=int, default=COPY_TOKENS, help="most rows of a case's copies")
    parser.add_argument("--most-seconds", type=float, default=MOST_SECONDS, help="of a repeat of a side")
    parser.add_argument("--toy", action="store_true", help="the machinery in seconds: toy shapes and small products")
    parser.add_argument("--name", default="gpu", help="of the files in the device's folder")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="holds a folder a device")
    parser.add_argument("--anew", action="store_true", help="replaces what an earlier run of this name has left")
    parser.add_argument("--retry", action="store_true", help="runs again what failed")
    parser.add_argument("--commit", help="of these files, where there is no repository to ask")
    found = parser.parse_args(arguments)
    if found.toy:
        found.shapes, found.copy_tokens = ["toy-deberta", "toy-roberta"], min(found.copy_tokens, 512)
        found.prompts, found.new_tokens = [9], min(found.new_tokens, 8)
    return found


def checked(its: argparse.Namespace) -> None:
    """Judges a request before anything is measured, and chooses the ops' backends where none are named.

    Raises:
        RequestError: something in it is not known, or cannot be used here.
    """
    check_device(its.device)
    for name, found, known in (
        ("peer", its.peers, peers.PEERS),
        ("dtype", its.dtypes, DTYPES),
        ("part", its.parts, PARTS),
        ("side", its.sides, SIDES),
        ("backend", its.op_backends or [], [backend.name for backend in backends.BACKENDS]),
    ):
        if unknown := [one for one in found if one not in known]:
            raise RequestError(f"{name} {unknown[0]!r} is not known; choose from {', '.join(known)}")
    for shape in its.shapes:
        named(shape)
    kind = torch.device(its.device).type
    if its.op_backends is None:
        usual = ("cuda", "triton") if kind == "cuda" else ("cpu",)
        its.op_backends = [name for name in usual if refusal(name, kind, its.dtypes) is None] + ["reference"]
    for name in its.op_backends:
        if reason := refusal(name, kind, its.dtypes):
            raise RequestError(reason)


def refusal(backend: str, device: str, dtypes: Sequence[str]) -> str | None:
    """Why a backend serves no op at all here, in any of these dtypes; None if it serves one."""
    reason = None
    for dtype in dtypes:
        for op in backends.OPS:
            try:
                backends.choose(op, device, DTYPES[dtype], backend)
                return None
            except BackendError as error:
                reason = reason or str(error)
    return reason


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    its = parsed(arguments)
    try:
        checked(its)
        folder = its.results / machine.slug(machine.device_name(its.device))
        with full_float32():
            bandwidth = copy_bandwidth(its.device, COPY_BYTES if not its.toy else 1 << 20)
            path = folder / f"{its.name}.json"
            result = Result.opened(path, header_of(its, bandwidth), anew=its.anew, retry=its.retry)
            folder.mkdir(parents=True, exist_ok=True)
            result.write()
            products = ((64, 64, 64),) if its.toy else None
            before = result.lists["rows"], result.header.get("matrix_rates", {})
            measuring = Measuring(its, products, result.header["copy_bandwidth"], before)
            result.header["matrix_rates"] = measuring.rates
            carry_out(steps(its, measuring), result, its.budget)
    except RequestError as error:
        say(f"gpu.py: {error}")
        return 2
    result.write(finished=True)
    for name in result.lists["not_run"]:
        say(f"not run: {name}")
    figure.write([result.path], folder / its.name)
    say(f"written: {result.path}")
    return 0 if result.agrees else 1


if __name__ == "__main__":
    sys.exit(main())
