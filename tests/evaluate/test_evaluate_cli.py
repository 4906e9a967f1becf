"""`python -m lychee_compile evaluate`, from the command line to the files it writes."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from evaluated import LAYERS, saved_tiny_model
from rich.console import Console
from synthetic_capture import synthetic_capture

from lychee_compile.__main__ import main
from lychee_compile.cli.evaluate import SUBJECTS, add_evaluate
from lychee_compile.cli.parser import Parser, parse_line
from lychee_compile.evaluate.ruler.catalogue import RULER
from lychee_compile.evaluate.tables import lengths_table, tasks_table
from lychee_compile.evaluate.task_texts import TASKS
from lychee_compile.evaluate.tasks import TaskAnswer, TaskResult


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def evaluate(command):
    return main(["evaluate", *shlex.split(command)])


def results_of(folder, *pictures):
    for picture in pictures:
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "results.json").read_text())


@pytest.mark.usefixtures("uncompiled_graphs", "seeded")
def test_every_subject_measures_a_model(folder, tmp_path, capsys):
    status = evaluate(
        f"all --model {folder} --out {tmp_path} --policies lychee,streaming --budgets 100,200 "
        "--text code --length 700 --steps 2 --budget 100 --drift-length 700 --prompt 400 "
        "--every 150 --queries 1 --tasks pass-key --repeats 1 --boundaries tokens,fixed "
        "--tiles 1 --shares 0.3 --save-captures"
    )
    printed = capsys.readouterr()
    assert status == 0, printed.err
    for heading in ("Fidelity:", "Drift:", "Tasks:", "Where chunks are cut", "Prefill:"):
        assert heading in printed.out
    pictures = ("mass_against_budget", "error_against_bytes", "error_against_generated")
    pictures += ("answers_against_budget", "mass_by_text", "error_against_pairs")
    results = results_of(tmp_path, *(f"{picture}.png" for picture in pictures))
    assert results["command"].startswith("python -m lychee_compile evaluate all --model")
    subjects = {"fidelity", "drift", "tasks", "text", "prefill"}
    assert set(results) == {"command", "environment", *subjects}
    (fidelity,) = results["fidelity"]
    assert (fidelity["text"], fidelity["length"], fidelity["steps"]) == ("code", 700, 2)
    assert len(fidelity["rows"]) == 2 * 2 * (LAYERS + 1)
    assert all(0 < row["mass"] <= 1 and row["violations"] == 0 for row in fidelity["rows"])
    (drift,) = results["drift"]
    assert {point["generated"] for point in drift["points"]} == {0, 150}
    (tasks,) = results["tasks"]
    assert len(tasks["answers"]) == 1 + 2 * 2
    (text,) = results["text"]
    assert {
        f"{p}:boundaries={b}" for p in ("lychee", "oracle") for b in ("tokens", "fixed")
    } == set(text["configs"])

    kept = tmp_path / "captures" / "code-700.safetensors"
    again = tmp_path / "again"
    command = f"fidelity --capture {kept} --policies lychee,streaming --budgets 100,200"
    assert evaluate(f"{command} --out {again}") == 0
    (replayed,) = results_of(again)["fidelity"]
    for ours, theirs in zip(replayed["rows"], fidelity["rows"], strict=True):
        assert ours["mass"] == pytest.approx(theirs["mass"], abs=1e-9)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_subject_has_help(subject, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate(f"{subject} --help")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "--model" in shown
    assert "--out" in shown


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("fidelity", "--model is needed: a folder"),
        ("tasks", "--model is needed: a folder"),
        ("fidelity --budgets 3", "option budget=3 is too small"),
        ("fidelity --budgets 1k", "argument --budgets: '1k': expected an integer of at least 1"),
        ("fidelity --policies lichee", "did you mean 'lychee'?"),
        ("fidelity --text latin", "--text latin: expected code, json, prose or KIND=FILE"),
        ("fidelity --capture missing", "cannot read the capture missing"),
        ("tasks --tasks riddle", "argument --tasks: 'riddle': expected some of pass-key"),
        ("text --boundaries lines", "argument --boundaries: 'lines': expected some of auto"),
        ("drift --length 100", "a prompt of 2048 tokens leaves nothing of 100"),
        ("drift --budget 0", "argument --budget: '0': expected an integer of at least 1"),
        ("fidelity --out taken", "--out taken: File exists"),
        ("poetry", "argument SUBJECT: invalid choice: 'poetry'"),
        ("fidelity --model nowhere/at/all", "--model nowhere/at/all: it cannot be loaded"),
        ("fidelity --model WORDLESS", "WORDLESS: no tokenizer, save it there by tokenizer.save"),
        ("fidelity --model FOLDER --device tpu9", "--device tpu9: expected cpu, cuda or cuda:N"),
        ("fidelity --model FOLDER --length 5000", "--length 5000: "),
        ("tasks --model FOLDER --length 5000", "--length 5000: expected at least 512"),
    ],
)
def test_errors_are_one_line_that_says_what_to_do(command, message, folder, capsys):
    Path("taken").touch()
    shutil.copytree(folder, "WORDLESS", ignore=shutil.ignore_patterns("tokenizer*"))
    assert evaluate(command.replace("FOLDER", str(folder))) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("python -m lychee_compile: error: ")
    assert message in line


def test_json_alone_is_on_stdout(tmp_path, capsys):
    synthetic_capture(300, 3).save(tmp_path / "capture")
    command = f"fidelity --capture {tmp_path / 'capture'} --policies streaming --budgets 100"
    assert evaluate(f"{command} --json") == 0
    printed = capsys.readouterr()
    shown = json.loads(printed.out)
    assert shown == results_of(Path("evaluation"))
    assert shown["fidelity"][0]["rows"][0]["policy"] == "streaming"
    assert "Fidelity:" in printed.err


def settings_of(command):
    parser = Parser()
    add_evaluate(parser.add_subparsers())
    return parse_line(parser, ["evaluate", *shlex.split(command)])


def test_tasks_go_by_groups_and_lengths_by_thousands():
    settings = settings_of("tasks --model x --tasks pass-key,ruler,multi-key --length 8k,4096,4k")
    assert settings.tasks == ["pass-key", *RULER]
    assert settings.length == [4096, 8192]
    assert settings_of("tasks --model x").tasks == list(TASKS)
    assert settings_of("tasks --model x").length == [12288]
    assert settings_of("fidelity --model x --length 8k").length == 8192


def test_answers_found_are_shown_by_length():
    def result(length, found):
        facts = {"task": "single-key", "depth": 0.5, "document_tokens": length, "expected": "1"}
        scores = {"exact": False, "log_likelihood": -1.0, "agreement": 0.5, "divergence": 0.1}
        answers = [
            TaskAnswer(policy=policy, budget=budget, predicted="2", found=found, **facts, **scores)
            for policy, budget in (("dense", None), ("lychee", 512))
        ]
        return TaskResult("tiny", length, {}, answers)

    console = Console(width=100)
    with console.capture() as shown:
        console.print(lengths_table([result(4096, 0.75), result(8192, 0.5)]))
        console.print(tasks_table(result(4096, 0.75)))
    words = " ".join(shown.get().split())
    assert "4,096 8,192" in words
    assert "dense 75.0% 50.0% lychee 512 75.0% 50.0%" in words
    assert "lychee 512 0.8 of 1" in words


def test_a_capture_of_neighbouring_tokens_has_no_drift(tmp_path, capsys):
    synthetic_capture(300, 3).save(tmp_path / "capture")
    assert evaluate(f"drift --capture {tmp_path / 'capture'} --budget 100") == 2
    assert "neighbouring positions alone" in capsys.readouterr().err
