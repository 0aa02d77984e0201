"""``make gpu-bench`` on toy shapes: its order, its budget, its capping, and what is left when it is killed."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_scripts import ROOT, script, strict

from mlmfast import cpu
from mlmfast.bench import machine, peers
from mlmfast.bench.peers import HuggingFaceEager, HuggingFaceScored
from mlmfast.bench.pll import Bench
from mlmfast.bench.shapes import SHAPES
from mlmfast.bench.work import Peak
from mlmfast.errors import RequestError
from mlmfast.masking import MaskPlan

gpu, steps = script("gpu"), script("gpu_steps")
LAUNCH = [sys.executable, str(ROOT / "benchmarks" / "from_checkout.py")]
# Ops are measured by the backend cpu here, all of which needs the compiled kernels.
compiled = pytest.mark.skipif(cpu.instructions() is None, reason="the compiled kernels are not built here")
QUICK = ["--device", "cpu", "--toy", "--rounds", "2", "--peers", "hf,hf-scored"]


def arguments(*more: str) -> argparse.Namespace:
    return gpu.parsed([*QUICK, *more])


# ---- the whole of it


@compiled
def test_the_whole_script_on_toy_shapes(tmp_path: Path) -> None:
    lengths = ["--lengths", "9,70", "--dtypes", "float32"]
    assert gpu.main([*QUICK, *lengths, "--results", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    assert folder.name == machine.slug(machine.cpu_name())
    result = strict(folder / "gpu.json")
    assert result["finished"]
    assert {(row["shape"], row["length"], row["peer"]) for row in result["rows"]} == {
        ("toy-deberta", 9, "hf-eager"),
        ("toy-deberta", 9, "hf-scored"),
        ("toy-deberta", 70, "hf-eager"),
        ("toy-deberta", 70, "hf-scored"),
        ("toy-roberta", 9, "hf-eager"),  # whose table ends at 64
        ("toy-roberta", 9, "hf-scored"),
    }
    assert all(row["ratio"] > 0 and row["copies"] == {9: 32, 70: 4}[row["length"]] for row in result["rows"])
    assert all(check["agrees"] for check in result["checks"])
    named = {"disentangled_attention", "attention", "linear", "add_layer_norm", "masked_embedding"}
    named |= {"pre_norm", "vocab_logprob", "vocab_topk", "rotary"}
    assert {check["op"] for check in result["checks"]} == {row["op"] for row in result["ops"]} == named
    assert {row["backend"] for row in result["ops"]} == {"cpu", "reference"}
    questions = {(row["shape"], row["case"], row["copies"], row["peer"]) for row in result["ranking"]}
    asked = [
        ("3 candidates of 4 tokens, 1 different, after 9", 6 * 12),
        ("4 candidates of 1 token, 1 different, after 20", 6 * 4),
    ]
    pairs = [(shape, peer) for shape in ("toy-deberta", "toy-roberta") for peer in ("hf-eager", "hf-scored")]
    assert questions == {(shape, *question, peer) for shape, peer in pairs for question in asked}
    assert [row["details"]["unique_copies"] for row in result["ranking"]] == [48, 48, 6, 6] * 2
    sides = ["exact", "window", "drafted", "hf-loop", "gpt2"]
    assert [row["side"] for row in result["generation"]] == sides * 2
    assert all(row["seconds_token"] > 0 and row["prompt"] == 9 for row in result["generation"])
    table = (folder / "gpu.md").read_text()
    assert table.count("| toy-deberta |") == 4 + 4 + 5
    assert all(title in table for title in ("## A pass", "### Ranking", "### Generation", "### The ops one by one"))
    assert f"commit {result['header']['commit']}" in table

    # The same again does nothing anew.
    assert gpu.main([*QUICK, *lengths, "--results", str(tmp_path), "--budget", "0"]) == 0
    again = strict(folder / "gpu.json")
    (continued,) = again["header"].pop("continued")
    assert continued["time"] >= result["header"]["time"]
    for changing in ("copy_bandwidth", "matrix_rates"):
        again["header"].pop(changing), result["header"].pop(changing)
    assert again == result
    assert "Continued" in (folder / "gpu.md").read_text()
    # Another setting is another result.
    assert gpu.main([*QUICK, *lengths, "--results", str(tmp_path), "--rounds", "3"]) == 2
    if importlib.util.find_spec("matplotlib"):
        assert (folder / "gpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.gpu
def test_the_whole_script_on_a_gpu(tmp_path: Path) -> None:
    flags = ["--device", "cuda", "--toy", "--rounds", "2", "--peers", "hf,hf-scored", "--lengths", "9,70"]
    gpu.main([*flags, "--results", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    result = strict(folder / "gpu.json")
    assert result["finished"]
    assert result["header"]["device"]["name"] == torch.cuda.get_device_name()
    assert not result["failed"]
    assert result["checks"] and all(row["agrees"] for row in [*result["checks"], *result["ops"]])
    assert all(row["ratio"] > 0 for row in result["rows"] if row["dtype"] == "float32")
    references = [row for row in result["ops"] if row["backend"] == "reference"]
    assert {row["timed_by"] for row in references} == {"graph", "events"}


def test_a_bare_checkout_has_its_kernels(tmp_path: Path) -> None:
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import importlib.util, sys, mlmfast, mlmfast.kernels\n"
        "print(mlmfast.__file__, mlmfast.kernels.__file__, sys.argv[1:], sep='\\n')\n"
        "print(importlib.util.find_spec('mlmfast.kernels.nothing'))\n"
    )
    # -I: no PYTHONPATH, no current folder; whatever is installed besides must not be what is found.
    command = [sys.executable, "-I", LAUNCH[1], str(probe), "--flag"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str(ROOT / "mlmfast" / "__init__.py"),
        str(ROOT / "kernels" / "__init__.py"),
        "['--flag']",
        "None",
    ]


def test_a_kill_leaves_what_was_measured(tmp_path: Path) -> None:
    command = [*LAUNCH, str(ROOT / "benchmarks" / "gpu.py"), *QUICK, "--lengths", "9,24", "--results", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        found: list[Path] = []
        while not (found and strict(found[0])["ops"]):  # every state that is met is whole
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
            found = list(tmp_path.glob("*/gpu.json"))
    finally:
        process.kill()
        process.wait()
    left = strict(found[0])
    assert not left["finished"]
    assert left["rows"] and left["header"]["matrix_rates"]


def test_wrong_requests(tmp_path: Path) -> None:
    for flags in (["--peers", "gpt"], ["--dtypes", "int8"], ["--device", "moon"], ["--parts", "x"], ["--sides", "x"]):
        assert gpu.main([*QUICK, *flags, "--results", str(tmp_path)]) == 2
    if not torch.cuda.is_available():
        assert gpu.main(["--results", str(tmp_path)]) == 2
    for backend, reason in (("x", "choose from cpu, cuda"), ("triton", "triton does not run on cpu")):
        with pytest.raises(RequestError, match=reason):
            gpu.checked(arguments("--op-backends", backend))
    assert not list(tmp_path.iterdir())


@compiled
def test_backends_of_ops_are_those_that_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    its = arguments()
    gpu.checked(its)
    assert its.op_backends == ["cpu", "reference"]
    monkeypatch.setattr(gpu, "check_device", lambda device: None)
    for here in (["cuda", "triton", "reference"], ["triton", "reference"]):
        monkeypatch.setattr(gpu, "refusal", lambda name, *_, here=here: None if name in here else f"no {name}")
        its = arguments("--device", "cuda")
        gpu.checked(its)
        assert its.op_backends == here
    with pytest.raises(RequestError, match="no cuda"):
        gpu.checked(arguments("--device", "cuda", "--op-backends", "cuda"))


def test_the_commit_of_files_without_a_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    its = arguments("--commit", "abc")
    gpu.checked(its)
    monkeypatch.setattr(machine, "commit", lambda: None)
    assert gpu.header_of(its, 1.0)["commit"] == "abc"
    monkeypatch.setattr(machine, "commit", lambda: "def-dirty")
    header = gpu.header_of(its, 1.0)
    assert header["commit"] == "def-dirty"
    assert len(header["sources"]) == 12 and header["sources"] == machine.sources()


# ---- order and budget


def test_what_matters_most_comes_first() -> None:
    everyone = [*steps.PEERS, *steps.COMPILED]
    found = steps.blocks(steps.SHAPE_NAMES, ("bfloat16", "float32"), steps.LENGTHS, everyone)
    order = [case for block in found for case in block]
    assert [(c.shape, c.dtype, c.length) for c in order[:4]] == [
        ("deberta-v3-base", "bfloat16", length) for length in (64, 128, 24, 512)
    ]
    plain = [(c.shape, c.dtype, c.length) for c in order if "hf" in c.against]
    assert len(plain) == len(set(plain))
    assert set(plain) == {
        (shape, dtype, length)
        for shape in steps.SHAPE_NAMES
        for dtype in ("bfloat16", "float32")
        for length in steps.LENGTHS
        if length <= 512 or "roberta" not in shape
    }
    for case in order:
        for peer in ("disentangled-flash", "flashdeberta"):
            assert (peer in case.against) == (case.shape.startswith("deberta") and "hf" in case.against)
    assert {case.shape for case in order if case.against == ("hf-compile",)} == set(steps.SHAPE_NAMES)
    assert not any(case.length > 512 for block in found[:6] for case in block)
    assert not any(steps.blocks(["roberta-base"], ["float32"], [64], ["disentangled-flash", "flashdeberta"]))


def test_every_shape_has_a_guess() -> None:
    guesses = {shape: steps.seconds_of(shape) for shape in SHAPES}
    assert all(guess == 1 for shape, guess in guesses.items() if shape.startswith("toy"))
    assert guesses["modernbert-base"] == pytest.approx(guesses["deberta-v3-base"], rel=0.1)
    assert guesses["esm2-t33-650m"] == pytest.approx(guesses["deberta-v2-xlarge"], rel=0.1)
    assert guesses["deberta-v2-xxlarge"] > guesses["deberta-v2-xlarge"] > guesses["roberta-large"] > 15
    # Everything but the embeddings, the head's first product, norms and biases.
    for shape in ("modernbert-base", "esm2-t33-650m", "deberta-v3-base"):
        with torch.device("meta"):
            model = SHAPES[shape].model_class(SHAPES[shape].config_class(**SHAPES[shape].settings))
        layers = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layer" in name]
        assert sum(p.numel() for p in layers) / 1e6 == pytest.approx(steps.millions(shape), rel=1e-3)


def test_steps_have_names_of_their_own() -> None:
    its = gpu.parsed(["--device", "cpu", "--op-backends", "reference"])
    measuring = steps.Measuring(arguments(), ((32, 32, 32),), 1e12)
    found = [step.name for step in steps.steps(its, measuring)]
    assert len(set(found)) == len(found)
    for shape in steps.SHAPE_NAMES:
        for dtype in ("bfloat16", "float32"):
            wanted = {f"{shape}, {dtype}, ranking against hf, hf-scored"}
            wanted |= {f"{shape}, {dtype}, generation after {prompt} tokens" for prompt in (32, 384)}
            assert wanted <= set(found)
    only = gpu.parsed(["--device", "cpu", "--op-backends", "reference", "--parts", "rank", "--dtypes", "float32"])
    ranked = [name for name in found if "float32, ranking" in name]
    assert [step.name for step in steps.steps(only, measuring) if "against float64" not in step.name] == ranked


def test_a_long_prompt_fits_every_shape() -> None:
    for shape in steps.SHAPE_NAMES:
        assert max(steps.PROMPTS) + 64 - 1 + 3 + 2 <= SHAPES[shape].held
        assert max(question.length for question in steps.QUESTIONS) <= SHAPES[shape].held


# ---- passes


class Paced:
    """A bench whose slower side takes a time a copy, and twice that from so many copies on."""

    def __init__(self, seconds_a_copy: float, doubled: int = 1000) -> None:
        self.seconds_a_copy, self.doubled, self.tries = seconds_a_copy, doubled, 0

    def texts(self, length: int, copies: int) -> int:
        return copies

    def tried(self, copies: int, labels: list[str]) -> dict[str, float]:
        self.tries += 1
        return {"": 0.0, "hf": self.seconds_a_copy * copies * (2 if copies >= self.doubled else 1)}


@pytest.mark.parametrize(("seconds_a_copy", "copies"), [(1e-6, 64), (0.004, 64), (0.047, 8), (9.0, 1)])
def test_copies_are_cut_to_what_a_repeat_may_take(seconds_a_copy: float, copies: int) -> None:
    bench = Paced(seconds_a_copy)
    assert steps.capped(bench, 64, ["hf"], 6400, 0.5) == copies
    assert bench.tries <= 2


def test_a_probe_that_underrates_the_whole_is_not_the_last_word() -> None:
    assert steps.capped(Paced(0.004, doubled=60), 64, ["hf"], 6400, 0.5) == 32  # 64 take 0.512 s


def test_batches_divide_the_copies() -> None:
    for copies in (1, 2, 3, 127, 128, 511, 512, 1023, 2730):
        rounded = steps.even(copies)
        assert copies / 2 < rounded <= copies
        for batch in (1, 32, 256, 512):
            assert rounded % min(batch, rounded) == 0
    assert steps.even(2730) == 2560


def test_a_pass_is_cut() -> None:
    measuring = steps.Measuring(arguments("--most-seconds", "1e-9"), ((32, 32, 32),), 1e12)
    found = measuring.passes(steps.Case("toy-roberta", "float32", 9, ("hf",)))
    assert [row["copies"] for row in found["rows"]] == [1]
    assert measuring.rates["float32"] > 0


def test_a_compiled_peer_has_the_copies_that_others_had_in_an_earlier_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "COMPILED", ("hf-scored",))  # which compiles in no time
    row = {"shape": "toy-roberta", "dtype": "float32", "length": 9, "copies": 5}
    measuring = steps.Measuring(arguments(), ((32, 32, 32),), 1e12, ([row], {"float32": 1e15}))
    found = measuring.passes(steps.Case("toy-roberta", "float32", 9, ("hf-scored",)))
    assert [row["copies"] for row in found["rows"]] == [5]
    assert measuring.rates["float32"] == 1e15


def test_a_failing_peer_has_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = HuggingFaceScored.logprobs
    calls = [0]

    def fails_third(self: Any, plan: MaskPlan) -> Any:
        calls[0] += 1
        if calls[0] >= 3:  # in the timed rounds
            raise RuntimeError("a kernel\n  was lost")
        return honest(self, plan)

    class Large(HuggingFaceEager):
        name = "large"

        def logprobs(self, plan: MaskPlan) -> Any:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(HuggingFaceScored, "logprobs", fails_third)
    monkeypatch.setitem(peers.PEERS, "large", Large)
    peak = Peak(torch.float32, ((32, 32, 32),))
    peak.sample()
    bench = Bench("toy-roberta", against=["hf", "hf-scored", "large"], keep_going=True)
    texts = bench.texts(9, 7)
    rows = {m.row.peer: m for m in bench.measure(texts, "random", pairs=3, peak=peak)}
    assert rows["hf-scored"].details["failure"] == "RuntimeError: a kernel was lost"
    assert rows["large"].details["failure"] == "OutOfMemoryError: no room"
    for name in ("hf-scored", "large"):
        row = rows[name].row
        assert (row.ratio, row.max_abs_diff, rows[name].details["agrees"]) == (None, None, False)
    honest_row = rows["hf-eager"]
    assert honest_row.row.ratio is not None
    assert len(honest_row.details["ratio"]["all"]) == 3  # all the rounds anew, without the one that failed
    with pytest.raises(torch.OutOfMemoryError):
        Bench("toy-roberta", against=["large"]).measure(texts, "random", pairs=1, peak=peak)


def test_peers_of_another_device_are_refused() -> None:
    with pytest.raises(RequestError, match="computes on cpu here, not on cuda"):
        peers.named(["openvino"], "float32", "cuda")
    assert set(peers.named(["hf", "hf-scored", "hf-compile"], "bfloat16", "cuda")) == {"hf", "hf-scored", "hf-compile"}


def test_on_a_gpu_batches_are_bounded_by_memory() -> None:
    """Meta tensors stand for a GPU: nothing is computed, the rule alone is asked."""
    shape = SHAPES["deberta-v3-base"]
    with torch.device("meta"):
        model = shape.model_class(shape.config_class(**shape.settings)).to(torch.bfloat16)
    subject = peers.Subject(model, shape.tokenizer(), "bfloat16")
    peer = HuggingFaceEager(subject)
    bench = Bench("toy-deberta")
    sizes = {}
    for length in (24, 512, 2048):
        plan = bench.plan(shape.texts(length, 2))
        peer._choose_batch(plan)
        sizes[length] = peer.batch
    # Numbers of 2 bytes in 4 GiB: 698 copies' logits, then 32 and 8.
    assert sizes == {24: 512, 512: 32, 2048: 8}
