"""``mlmfast needle`` from outside: what it writes, how it ends, and that a killed run goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import sentences
from typer.testing import CliRunner, Result

import mlmfast
from mlmfast import cli
from mlmfast.icl.needle_report import DEBERTA, markdown

# The command line in a process of its own that kills itself, as a machine does, when so many batches are kept.
DRIVER = """
import os, signal
from mlmfast.cli import main
from mlmfast.ledger import Ledger
add, left = Ledger.add, [int(os.environ["BATCHES"])]
def dying(self, records):
    add(self, records)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
Ledger.add = dying
main()
"""
SMALL = ("--placements", "3", "--repetitions", "2")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["needle", *arguments])


@pytest.fixture(scope="module")
def haystack(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("haystack") / "text.txt"
    path.write_text("\n".join(sentences(300)), encoding="utf-8")
    return str(path)


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_masked_and_causal_side_by_side(folders: dict[str, Path], haystack: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    bert, gpt2 = str(folders["bert"]), str(folders["gpt2"])
    models = ("--model", bert, "--model", gpt2)
    result = invoke(*models, "--haystack", haystack, "--lengths", "430,800", *SMALL, "--output", f"{output}/")
    assert result.exit_code == 0, result.output
    found = json.loads((output / "needle.json").read_text(encoding="utf-8"))
    assert found["settings"]["lengths"] == [430, 800] and found["settings"]["haystack"] == "text.txt"
    assert found["chance"] == {"number": 1 / 900_000, "digit": 0.1}
    first, second = found["models"]
    assert (first["name"], first["kind"]) == (bert, "masked") and (second["name"], second["kind"]) == (gpt2, "causal")
    assert first["settings"]["separator"] == "\\n " and second["settings"]["separator"] == "\n"
    assert first["rows"][1]["too_long"] == f"{bert} holds 700 tokens, 800 were asked for"
    assert [len(row["accuracy"]) for row in (first["rows"][0], *second["rows"])] == [3, 3, 3]
    assert second["rows"][0]["truncated"] == 0 and 50 < second["rows"][1]["truncated"] <= 100

    files = sorted(path.name for path in output.glob("needles-*.jsonl"))
    assert len(files) == 2
    for model, path in zip((first, second), [p for n in ("bert", "gpt2") for p in output.glob(f"*{n}*.jsonl")]):
        header, *records = answers(path)
        assert header["settings"] == model["settings"]
        for row in model["rows"]:
            own = [record for record in records if record["length"] == row["length"]]
            assert len(own) == row["needles"]
            assert all(record["right"] == (record["answer"] == record["number"]) for record in own)
            assert all(re.fullmatch(r"\d{6}", record["answer"]) for record in own)

    page = (output / "needle.md").read_text(encoding="utf-8")
    assert page == markdown(found) and page.startswith(result.stdout.rstrip())
    assert "| 800 | too long |" in page and "Too long: " in page and "The beginning was cut off" in page
    assert "1 of 900,000" in page and "published, not measured here" in page
    assert "| 2048 | 88 | 72 | 70 | 67 | 68 | 71 | 63 | 61 | 66 | 74 | 95 | 72 | 82 to 99 |" in page
    assert "approximate" not in page
    if (output / "needle.png").exists():
        assert (output / "needle.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (output / "needle.svg").read_text(encoding="utf-8")
    else:
        assert "matplotlib is not installed" in result.stderr


def test_without_matplotlib_no_figure_is_named(
    folders: dict[str, Path], haystack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    options = ("--model", str(folders["gpt2"]), "--haystack", haystack, "--lengths", "150", *SMALL)
    result = invoke(*options, "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    *_, missing, written = result.stderr.splitlines()
    assert 'pip install "mlmfast[eval]"' in missing
    assert written.endswith("needle.json, needle.md and every answer")
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".jsonl"}


def test_published_rows_are_whole() -> None:
    assert all(len(shares) == 11 and max(shares) <= 100 for shares in DEBERTA.values()) and len(DEBERTA) == 12


def test_a_killed_run_goes_on(folders: dict[str, Path], haystack: str, tmp_path: Path) -> None:
    common = ["--model", str(folders["deberta"]), "--haystack", haystack, "--lengths", "150,300", *SMALL]
    common += ["--batch-tokens", "600"]
    whole = invoke(*common, "--output", str(tmp_path / "whole"))
    assert whole.exit_code == 0, whole.output
    command = [sys.executable, "-c", DRIVER, "needle", *common, "--output", str(tmp_path / "killed")]
    environment = {"PYTHONPATH": str(Path(mlmfast.__file__).parents[1]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    died = subprocess.run(command, env=os.environ | environment | {"BATCHES": "3"}, capture_output=True, timeout=300)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    (path,) = (tmp_path / "killed").iterdir()  # no table of a run that has not ended
    assert len(answers(path)) == 1 + 6 + 2  # batches of 4 and 2 of the first length, of 2 of the second
    kept = path.read_bytes()
    again = invoke(*common, "--output", str(tmp_path / "killed"))
    assert again.exit_code == 0 and "; 8 needles are kept" in again.stderr
    assert path.read_bytes().startswith(kept)
    for name in (path.name, "needle.json", "needle.md"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    changed = invoke(*common, "--seed", "43", "--cache", "window", "--output", str(tmp_path / "killed"))
    assert changed.exit_code == 2
    assert "other settings: seed was 42 and is now 43; cache was 'none' and is now 'window'" in changed.stderr
    assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()


def test_the_window_cache_is_called_approximate(folders: dict[str, Path], haystack: str, tmp_path: Path) -> None:
    options = ("--model", str(folders["deberta"]), "--haystack", haystack, "--lengths", "150", *SMALL)
    result = invoke(*options, "--cache", "window", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "(masked, **approximate: cache window**)" in (tmp_path / "needle.md").read_text(encoding="utf-8")
    assert "approximate: cache window" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "12,x"], "--lengths 12,x is no list of numbers"),
        (["--lengths", "30"], "length 30 is too short"),
        (["--lengths", "9000"], "the haystack is too short"),
        (["--placements", "1"], "placements=1"),
        (["--cache", "prefix"], "choose none \\(exact\\) or window"),
        (["--masks", "3"], "No such option"),
        (["--num-masks", "0"], "num_masks=0"),
        (["--model", "tiny", "--model", "tiny"], "one is named twice"),
        (["--haystack", "missing.txt"], "cannot read missing.txt"),
        (["--model", "no/such"], "no model is there"),
    ],
    ids=str,
)
def test_wrong_requests(
    arguments: list[str], message: str, haystack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without a network every look at the Hub would be tried for seconds.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    given = ["--haystack", haystack] if "--haystack" not in arguments else []
    result = invoke(*given, "--output", str(tmp_path / "out"), *arguments)
    assert result.exit_code == 2
    assert re.search(message, " ".join(re.sub("[│╭╰─╮╯]", " ", result.stderr).split())), result.stderr


def test_an_output_that_is_a_file_is_refused(haystack: str) -> None:
    result = invoke("--haystack", haystack, "--output", haystack)
    assert result.exit_code == 2 and "is a file; give a folder" in result.stderr


def test_the_command_is_found_without_torch() -> None:
    code = "import sys, mlmfast.icl.needle_command; print('torch' in sys.modules)"
    root = str(Path(mlmfast.__file__).parents[1])
    found = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": root}, capture_output=True)
    assert found.stdout.decode().strip() == "False", found.stderr.decode()
