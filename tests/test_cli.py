"""The command line from outside: what it writes where, its exit status, and how it ends when it is ended."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoints import sentences
from typer.testing import CliRunner, Result

import mlmfast
from mlmfast import cli, corpus
from mlmfast.readers import Row

# Runs the command line in a process of its own, which hears an interrupt even where a shell put this one into the
# background, and so told it not to. SLOW makes every call of score() wait, and says so to a file.
DRIVER = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
import mlmfast
from mlmfast.cli import main
if os.environ.get("SLOW"):
    from mlmfast.model import MaskedLM
    score, calls = MaskedLM.score, []
    def slow(self, texts, **options):
        calls.append(texts)
        with open(os.environ["SLOW"], "a") as log:
            log.write("call\\n")
        if len(calls) > 2:
            time.sleep(60)
        return score(self, texts, **options)
    MaskedLM.score = slow
if os.environ.get("WINDOW_ROWS"):
    from mlmfast import corpus
    corpus.WINDOW_ROWS = int(os.environ["WINDOW_ROWS"])
main()
"""


def start(*arguments: str, **settings: str) -> subprocess.Popen[bytes]:
    root = str(Path(mlmfast.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | settings
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", DRIVER, *arguments], env=environment, **pipes)


def invoke(*arguments: str, text: str | bytes | None = None) -> Result:
    """The same within this process, many times faster."""
    return CliRunner().invoke(cli.app, list(arguments), input=text)


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.split("\n") if line]


def wait_for(log: Path, calls: int) -> None:
    deadline = time.monotonic() + 60
    while not log.exists() or len(log.read_text().split()) < calls:
        assert time.monotonic() < deadline, "the run has not come this far"
        time.sleep(0.05)


@pytest.fixture
def model(bert_folder: Path) -> str:
    return str(bert_folder)


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(sentences(40)) + "\n", encoding="utf-8")
    return path


# ---- start-up


def test_help_does_not_import_torch() -> None:
    code = "import sys; from mlmfast.cli import app; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    root = str(Path(mlmfast.__file__).parents[1])
    found = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": root}, capture_output=True)
    assert found.stdout.decode().strip() == "[]", found.stderr.decode()


def test_version_and_help() -> None:
    assert invoke("--version").stdout == f"mlmfast {mlmfast.__version__}\n"
    wide = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(cli.app, ["score", "--help"]).stdout
    words = " ".join(wide.replace("│", " ").split())
    assert all(metric in words for metric in mlmfast.METRICS)
    assert "strided (approximate" in words
    assert "pll" in invoke("bench", "--help").stdout
    assert 'mlmfast rank "2 + 2 =" " 4" " 5"' in invoke("rank", "--help").stdout


# ---- score


def test_scores_are_those_of_the_python_interface(model: str, corpus_file: Path) -> None:
    result = invoke("score", str(corpus_file), "--model", model, "--metric", "window", "--window", "2", "--ranks")
    assert result.exit_code == 0, result.output
    found = records(result.stdout)
    expected = mlmfast.load(model).score(sentences(40), metric="window", window=2, ranks=True)
    assert [list(record) for record in found] == 40 * [
        ["text", "pll", "tokens", "logprobs", "perplexity", "ranks"],
    ]
    for record, score in zip(found, expected):
        assert record["text"] == score.text
        assert record["tokens"] == score.tokens
        assert record["logprobs"] == pytest.approx(score.logprobs, rel=1e-5)
        assert record["pll"] == pytest.approx(score.total, rel=1e-5)
        assert record["perplexity"] == pytest.approx(score.perplexity, rel=1e-4)
        assert record["ranks"] == score.ranks.tolist()


def test_options_reach_the_model(model: str) -> None:
    def pll(*options: str) -> float:
        return float(
            records(invoke("score", "--model", model, *options, text="The cat follows no dogs.\n").stdout)[0]["pll"]
        )

    lm, texts = mlmfast.load(model), ["The cat follows no dogs."]
    assert pll("--temperature", "2.5") == pytest.approx(lm.score(texts, temperature=2.5)[0].total, rel=1e-5)
    assert pll("--metric", "strided", "--stride", "3") == pytest.approx(
        lm.score(texts, metric="strided", stride=3)[0].total, rel=1e-5
    )
    assert pll("--metric", "unmasked") != pytest.approx(pll(), rel=1e-3)


def test_bad_rows_are_said_and_cost_no_others(model: str, tmp_path: Path) -> None:
    long = "the cat " * 60
    rows = [
        '{"text": "The cat."}',
        "{malformed",
        '{"text": ""}',
        f'{{"text": "{long}"}}',
        '{"text": 5}',
        '{"text": "A"}',
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows), encoding="utf-8")
    result = invoke("score", str(path), "--model", model)
    assert result.exit_code == 1
    found = records(result.stdout)
    assert [record.get("error", "")[:6] for record in found] == ["", "row 2 ", "row 3 ", "row 4 ", "row 5 ", ""]
    assert [record["text"] for record in found] == ["The cat.", None, "", long, None, "A"]
    assert "48" in found[3]["error"]  # what the model holds
    clean = records(invoke("score", "--model", model, text="The cat.\nA\n").stdout)
    assert [found[0]["pll"], found[5]["pll"]] == pytest.approx([record["pll"] for record in clean], rel=1e-5)
    assert "6 rows, 4 with an error" in result.stderr
    cut = records(invoke("score", str(path), "--model", model, "--truncation", "right").stdout)
    assert len(cut[3]["tokens"]) == 46


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_scores(model: str, tmp_path: Path, kind: str) -> None:
    texts = [*sentences(5), 'A "quoted", remarkable cat.']
    path = tmp_path / f"corpus.{kind}"
    field = "text" if kind == "txt" else "sentence"
    if kind == "txt":
        path.write_text("\n".join(texts), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"id": 1, field: text}) for text in texts), encoding="utf-8")
    elif kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.table({"id": range(6), field: texts}), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream, delimiter="\t" if kind == "tsv" else ",").writerows(
                [["id", field]] + [[1, t] for t in texts]
            )
    result = invoke("score", str(path), "--model", model, "--field", field)
    assert result.exit_code == 0, result.output
    expected = invoke("score", "-", "--model", model, text="\n".join(texts))
    assert result.stdout == expected.stdout
    assert [record["text"] for record in records(result.stdout)] == texts


def test_standard_input_in_another_format(model: str) -> None:
    result = invoke("score", "-", "--model", model, "--format", "jsonl", text='{"text": "The cat."}\n')
    assert [record["text"] for record in records(result.stdout)] == ["The cat."]


def test_the_summary_goes_to_stderr_and_names_what_is_approximate(model: str) -> None:
    result = invoke("score", "--model", model, "--metric", "strided", text="The cat.\n")
    assert len(records(result.stdout)) == 1
    assert result.stderr.startswith("mlmfast: 1 rows, 0 with an error, 3 tokens scored in ")
    assert result.stderr.endswith("metric strided (approximate)\n")
    assert "approximate" not in invoke("score", "--model", model, text="The cat.\n").stderr
    assert invoke("score", "--model", model, "--quiet", text="The cat.\n").stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["FILE", "--metric", "perplexity"], "metric 'perplexity' is not known; choose one of original, "),
        (["FILE", "--model", "/no/such/folder"], "no model is there"),
        (["absent.txt"], "cannot read absent.txt: No such file"),
        (["FILE", "--format", "xml"], "format 'xml' is not known"),
        (["FILE", "--format", "csv"], "no column 'text'"),
        (["FILE", "--format", "jsonl"], "no row can be read: row 1 is not JSON"),
        (["FILE", "--dtype", "int8"], "dtype='int8' is not known"),
        (["FILE", "--device", "abacus"], "device 'abacus' cannot be used here"),
        (["FILE", "--backend", "abacus"], "backend 'abacus' is not known"),
        (["FILE", "--semantics", "none"], "semantics='none' is not known"),
        (["FILE", "--temperature", "0"], "temperature"),
        (["FILE", "--truncation", "middle"], "truncation='middle' is not known"),
        (["FILE", "--window", "0", "--metric", "window"], "window=0"),
        (["FILE", "--output", "no/such/folder.jsonl"], "there is no folder no/such"),
        (["FILE", "--output", "FILE"], "is the input"),
        (["FILE", "--output", "out/", "--shard-rows", "0"], "at least one row"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_a_wrong_request_is_one_line_and_status_2(
    model: str, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = corpus_file.read_bytes()
    arguments = [str(corpus_file) if argument == "FILE" else argument for argument in arguments]
    given = arguments if "--model" in arguments else [*arguments, "--model", model]
    result = invoke("score", *given)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.strip().split("\n")) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"]  # nothing left behind
    assert corpus_file.read_bytes() == before


def test_an_unexpected_failure_is_neither_status_1_nor_2(corpus_file: Path) -> None:
    code = "import mlmfast, sys\nmlmfast.load = None\nfrom mlmfast.cli import main\nmain()"
    root = str(Path(mlmfast.__file__).parents[1])
    found = subprocess.run(
        [sys.executable, "-c", code, "score", str(corpus_file)],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
    )
    assert found.returncode == 70
    assert b"Traceback" in found.stderr


# ---- how runs end


def test_interrupted_to_a_file_and_run_again(
    model: str, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["score", str(corpus_file), "--model", model, "--output", str(tmp_path / "out.jsonl")]
    whole = ["score", str(corpus_file), "--model", model, "--output", str(tmp_path / "whole.jsonl")]
    process = start(*command, SLOW=str(tmp_path / "log"), WINDOW_ROWS="8")
    wait_for(tmp_path / "log", 3)
    assert not (tmp_path / "out.jsonl").exists()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == b""
    (partial,) = tmp_path.glob("out.jsonl.*.partial")
    told, interrupted = err.decode().strip().split("\n")
    assert told == f"mlmfast: 16 rows are kept in {partial}; run the same command again to continue"
    assert interrupted == "mlmfast: interrupted"
    monkeypatch.setattr(corpus, "WINDOW_ROWS", 8)
    again = invoke(*command)
    assert again.exit_code == 0
    assert "40 rows (16 of them by an earlier run)" in again.stderr
    assert invoke(*whole).exit_code == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not partial.exists()


def test_killed_in_a_folder_and_run_again(
    model: str, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(folder: str) -> list[str]:
        return ["score", str(corpus_file), "--model", model, "--output", f"{tmp_path}/{folder}/", "--shard-rows", "12"]

    process = start(*command("out"), SLOW=str(tmp_path / "log"), WINDOW_ROWS="8")
    wait_for(tmp_path / "log", 3)
    process.kill()
    process.communicate(timeout=60)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.jsonl")) == ["part-00000.jsonl"]
    monkeypatch.setattr(corpus, "WINDOW_ROWS", 8)
    again = invoke(*command("out"))
    assert again.exit_code == 0
    assert "40 rows (12 of them by an earlier run)" in again.stderr
    assert invoke(*command("whole")).exit_code == 0
    names = [path.name for path in sorted((tmp_path / "out").iterdir())]
    assert names == ["_manifest", *(f"part-{i:05d}.jsonl" for i in range(4))]
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    other = invoke(*command("out"), "--temperature", "2")
    assert other.exit_code == 2
    assert "temperature was 1.0 and is now 2.0" in other.stderr


def test_a_reader_that_goes_away_ends_the_run_quietly(model: str, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("\n".join(sentences(2000)), encoding="utf-8")  # more than a pipe holds
    process = start("score", str(path), "--model", model, WINDOW_ROWS="16")
    assert process.stdout is not None
    assert process.stderr is not None
    first = process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read().decode()
    assert json.loads(first)["text"] == sentences(1)[0]
    assert process.wait(timeout=60) == 141
    assert err == ""


def test_lines_come_out_before_the_input_ends(model: str) -> None:
    process = start("score", "--model", model, WINDOW_ROWS="2")
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"The cat.\nThe dogs.\nNo gardener.\n")
    process.stdin.flush()
    assert [json.loads(process.stdout.readline())["text"] for _ in range(2)] == ["The cat.", "The dogs."]
    out, _ = process.communicate(timeout=60)
    assert [record["text"] for record in records(out.decode())] == ["No gardener."]
    assert process.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_line_and_status_2(model: str, corpus_file: Path) -> None:
    result = invoke("score", str(corpus_file), "--model", model, "--output", "/dev/full")
    assert result.exit_code == 2
    assert result.stderr == "mlmfast: cannot write /dev/full: No space left on device\n"


# ---- rank


def test_rank_writes_what_the_python_interface_ranks(model: str) -> None:
    options = [" the dogs.", " no cat.", " humming"]
    for normalize in ("none", "tokens", "unconditional"):
        extra = ["--normalize", normalize, "--unconditional-prompt", "The"]
        result = invoke("rank", "The cat follows", *options, "--model", model, *extra)
        assert result.exit_code == 0, result.output
        (record,) = records(result.stdout)
        expected = mlmfast.load(model).rank(
            "The cat follows",
            options,
            normalize=None if normalize == "none" else normalize,
            unconditional_prompt="The",
        )
        assert list(record) == ["prompt", "options", "values", "probabilities", "best", "order", "cache"]
        assert record["values"] == pytest.approx(expected.values, rel=1e-5)
        assert record["probabilities"] == pytest.approx(expected.probabilities, rel=1e-4)
        assert (record["best"], record["order"]) == (expected.best, expected.order)


def test_rank_reads_a_file_and_survives_its_bad_rows(model: str, tmp_path: Path) -> None:
    good = {"prompt": "The cat", "options": [" watches", " follow"]}
    bad = ["{", '{"prompt": "x"}', '{"prompt": 1, "options": [" a"]}', '{"prompt": "x", "options": []}']
    bad += ['{"prompt": "x", "options": [" a", 2]}', '{"prompt": "x", "options": [" a", "\\ud83d"]}']
    too_long = json.dumps({"prompt": "the " * 60, "options": [" cat", " dogs"]})
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join([json.dumps(good), *bad, too_long, json.dumps(good)]), encoding="utf-8")
    result = invoke("rank", "--file", str(path), "--model", model)
    assert result.exit_code == 1
    first, *errors, last = records(result.stdout)
    (alone,) = records(invoke("rank", good["prompt"], *good["options"], "--model", model).stdout)
    assert first == last == alone
    assert [record["error"].split()[1] for record in errors] == ["2", "3", "4", "5", "6", "7", "8"]
    assert "with option ' cat' it has" in errors[-1]["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a prompt and options, or --file"),
        (["The cat"], "give the options"),
        (["The cat", " a", "--file", "x.jsonl"], "give a prompt and options, or --file"),
        (["--file", "absent.jsonl"], "cannot read absent.jsonl"),
        (["The cat", " a", "--metric", "windows"], "metric 'windows' is not known"),
        (["The cat", " a", "--normalize", "length"], "--normalize length is not known"),
        (["The cat", " a", ""], "with option '' it has no token"),
    ],
)
def test_a_wrong_ranking_is_one_line_and_status_2(model: str, arguments: list[str], message: str) -> None:
    result = invoke("rank", *arguments, "--model", model)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.strip().split("\n")) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_rank_prints_a_table_on_a_terminal(model: str) -> None:
    import pty

    parent, child = pty.openpty()
    root = str(Path(mlmfast.__file__).parents[1])
    command = [sys.executable, "-c", DRIVER, "rank", "The [b]cat", " watches", " follow", "--model", model]
    environment = os.environ | {"PYTHONPATH": root, "NO_COLOR": "1", "COLUMNS": "80"}
    process = subprocess.Popen(command, env=environment, stdout=child, stdin=child, stderr=subprocess.PIPE)
    os.close(child)
    assert process.wait(timeout=60) == 0
    shown = os.read(parent, 10_000).decode()
    os.close(parent)
    (record,) = records(invoke("rank", "The [b]cat", " watches", " follow", "--model", model).stdout)
    assert "'The [b]cat'" in shown  # not taken for markup
    assert shown.index(repr(record["best"])) < shown.index(repr(record["options"][record["order"][1]]))
    best = max(record["values"])  # another process, which may have other threads and so another rounding
    assert any(abs(float(value) - best) < 2e-4 for value in re.findall(r"-\d+\.\d{4}", shown))


# ---- generate


def test_generate_writes_what_the_python_interface_generates(model: str, tmp_path: Path) -> None:
    lm = mlmfast.load(model)
    prompt = "The cat watches"
    expected = lm.generate(prompt, max_new_tokens=6)
    (record,) = records(invoke("generate", prompt, "--max-new-tokens", "6", "--model", model).stdout)
    assert record == {
        "text": prompt,
        "continuation": expected.text,
        "tokens": expected.tokens,
        "logprobs": [float(str(x)) for x in expected.logprobs],
        "stopped": expected.stopped,
        "cache": "none",
    }
    options = ["--num-beams", "3", "--length-penalty", "0.5", "--num-masks", "2", "--min-new-tokens", "3"]
    found = invoke("generate", prompt, "--max-new-tokens", "6", "--model", model, *options).stdout
    beams = lm.generate(prompt, max_new_tokens=6, num_beams=3, length_penalty=0.5, num_masks=2, min_new_tokens=3)
    assert records(found)[0]["tokens"] == beams.tokens


def test_generate_reads_a_file_and_survives_its_bad_rows(model: str, tmp_path: Path) -> None:
    lm = mlmfast.load(model)
    prompts = ["The cat watches", "a " * 60, "Every dog", "No sparrows"]
    source = tmp_path / "prompts.txt"
    source.write_text("\n".join(prompts) + "\n")
    output = tmp_path / "out.jsonl"
    arguments = ["--file", str(source), "--model", model, "--max-new-tokens", "5", "--sample", "--seed", "3"]
    done = invoke("generate", *arguments, "--output", str(output))
    assert done.exit_code == 1 and "4 rows, 1 with an error" in done.stderr
    found = records(output.read_text())
    assert [record["text"] for record in found] == prompts
    assert "row 2 has 60 tokens, which leaves no room" in found[1]["error"]
    for place in (0, 2, 3):
        expected = lm.generate([*["a"] * place, prompts[place]], max_new_tokens=5, do_sample=True, seed=3)[place]
        assert found[place]["tokens"] == expected.tokens
    window = invoke("generate", "--file", str(source), "--model", model, "--cache", "window", "--max-new-tokens", "2")
    assert "cache window (approximate)" in window.stderr


def test_a_rows_sample_is_its_own_beside_rows_that_cannot_be_read(model: str, tmp_path: Path) -> None:
    source, whole = tmp_path / "prompts.jsonl", tmp_path / "whole.jsonl"
    lines = ['{"text": "The cat"}', "{", '{"text": "Every dog"}', '{"text": "No sparrows"}']
    source.write_text("\n".join(lines) + "\n")
    whole.write_text("\n".join([lines[0], '{"text": "a"}', *lines[2:]]) + "\n")
    arguments = ["--model", model, "--max-new-tokens", "6", "--sample", "--temperature", "4", "--seed", "3"]
    found, expected = (records(invoke("generate", "--file", str(f), *arguments).stdout) for f in (source, whole))
    assert [record.get("tokens") for record in found[2:]] == [record["tokens"] for record in expected[2:]]


def test_a_window_of_rows_that_was_interrupted_is_not_written(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = mlmfast.load(model)

    def interrupted(*given: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlmfast.decoding.found_in", interrupted)
    with pytest.raises(KeyboardInterrupt):
        corpus.generate_window(lm, {"seed": 0}, [Row(0, "The cat")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a prompt or --file, and not both"),
        (["The cat", "--file", "x"], "give a prompt or --file, and not both"),
        (["The cat", "--output", "x"], "--output is for the rows of --file"),
        (["The cat", "--num-masks", "0"], "num_masks=0 predicts nothing"),
        (["The cat", "--num-beams", "2", "--sample"], "beam search does not sample"),
        (["The cat", "--cache", "all"], "cache='all' is not known"),
        (["a " * 60], "leaves no room for one more"),
        (["The cat", "--temperature", "0.5"], "temperature=0.5 is for sampling"),
        (["The cat", "--sample", "--temperature", "0"], "temperature=0.0 is not a number above 0"),
    ],
)
def test_a_wrong_generation_is_one_line_and_status_2(model: str, arguments: list[str], message: str) -> None:
    result = invoke("generate", *arguments, "--model", model)
    assert result.exit_code == 2
    assert message in result.stderr and result.stdout == ""
    assert len(result.stderr.strip().split("\n")) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_generate_shows_the_text_on_a_terminal(model: str) -> None:
    import pty

    parent, child = pty.openpty()
    root = str(Path(mlmfast.__file__).parents[1])
    command = [sys.executable, "-c", DRIVER, "generate", "The cat", "--model", model, "--max-new-tokens", "5"]
    environment = os.environ | {"PYTHONPATH": root, "NO_COLOR": "1", "COLUMNS": "80"}
    process = subprocess.Popen(command, env=environment, stdout=child, stdin=child, stderr=subprocess.PIPE)
    os.close(child)
    assert process.wait(timeout=60) == 0
    shown = os.read(parent, 10_000).decode()
    os.close(parent)
    assert shown.strip() == str(mlmfast.load(model).generate("The cat", max_new_tokens=5)).strip()


# ---- doctor


def test_doctor_names_versions_machine_and_backends() -> None:
    import torch

    from mlmfast.backends import OPS

    findings = json.loads(invoke("doctor", "--json").stdout)
    assert findings["versions"]["torch"] == torch.__version__
    assert findings["versions"]["mlmfast"] == mlmfast.__version__
    assert findings["machine"]["threads"] == torch.get_num_threads()
    assert findings["machine"]["cores"] >= 1
    for services in findings["backends"]["cpu"].values():
        assert [service["op"] for service in services] == list(OPS)
        assert all(service["reason"] for service in services)
    assert {"bert", "deberta-v2", "roberta", "xlm-roberta"} <= set(findings["families"])
    shown = CliRunner(env={"COLUMNS": "160"}).invoke(cli.app, ["doctor"]).stdout
    assert "serves every op" in shown
    assert torch.__version__ in shown
