"""All commands alike: help, JSON, and errors of one line."""

from __future__ import annotations

import importlib.util

import pytest

from lychee_compile.__main__ import main
from lychee_compile.cli.lengths import length_name, lengths, tokens

pytest.importorskip("transformers")

from saved_configurations import save_llama
from transformers import BertConfig, T5Config


@pytest.mark.parametrize("command", ["explain", "bench", "evaluate", "evaluate tasks"])
def test_every_command_has_help_with_json_or_subjects(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "usage: python -m lychee_compile" in shown
    assert "--json" in shown or "SUBJECT" in shown
    assert "examples:" in shown or command == "evaluate tasks"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "required: COMMAND (choose from 'explain', 'bench', 'evaluate'; --help says more)"),
        ("evaluate", "required: SUBJECT (choose from 'fidelity', 'drift', "),
        ("explain", "required: MODEL_DIR"),
        ("explode FOLDER", "invalid choice: 'explode'"),
        ("explain nowhere", "nowhere: no such folder, and no model of that name is cached here"),
        ("bench no/where", "no/where: no such folder"),
        ("explain EMPTY", "this folder has no config.json"),
        ("explain T5", "expected a causal language model"),
        ("explain BERT", "bert: expected a causal language model, and BertModel cannot be traced"),
        ("explain FOLDER --context 8q", "argument --context: '8q': expected an integer"),
        ("explain FOLDER --context 1", "--context 1: expected at least 2 tokens"),
        ("explain FOLDER --batch 0", "argument --batch: '0': expected an integer of at least 1"),
        ("explain FOLDER --policy lichee", "did you mean 'lychee'?"),
        ("bench FOLDER --policy lychee:recent", "expected NAME or NAME:option=value"),
        ("explain FOLDER --option recent", "--option 'recent': expected NAME=VALUE"),
        ("explain FOLDER --option resent=8", "did you mean 'recent'?"),
        ("bench FOLDER --budget 3", "option budget=3 is too small"),
        ("bench FOLDER --budget many", "option budget='many' (str)"),
        ("bench FOLDER --ways fast", "'fast': expected some of eager, compiled, flash"),
        ("bench FOLDER --context 64", "--context 64: expected more than 90 tokens"),
        ("bench FOLDER", "it cannot be loaded"),
        ("bench FOLDER", "--random-weights needs none"),
        ("explain FOLDER --device tpu9", "--device tpu9: expected cpu, cuda or cuda:N"),
        ("explain FOLDER --dtype int8", "argument --dtype: invalid choice: 'int8'"),
    ],
)
def test_errors_are_one_line(command, message, tmp_path, capsys):
    places = {"FOLDER": tmp_path / "model", "EMPTY": tmp_path / "empty"}
    places |= {"T5": tmp_path / "t5", "BERT": tmp_path / "bert"}
    save_llama(places["FOLDER"], layers=2)
    T5Config(num_layers=1, d_model=8, num_heads=1).save_pretrained(places["T5"])
    encoder = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1}
    BertConfig(**encoder, architectures=["BertModel"]).save_pretrained(places["BERT"])
    places["EMPTY"].mkdir()
    assert main([str(places.get(part, part)) for part in command.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    *_, line = printed.err.strip().splitlines()
    assert line.startswith("python -m lychee_compile: error: ")
    assert message in line
    assert "torch/_" not in printed.err  # Dynamo's own log


@pytest.mark.parametrize("command", ["explain model", "bench model", "evaluate tasks --model x"])
def test_missing_transformers_is_one_line(command, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = importlib.util.find_spec

    def find_spec(name, *more):
        return None if name == "transformers" else found(name, *more)

    for module in ("lychee_compile.cli.errors", "lychee_compile.evaluate.errors"):
        monkeypatch.setattr(f"{module}.find_spec", find_spec)
    assert main(command.split()) == 2
    assert "needs transformers, not installed here: pip install" in capsys.readouterr().err


def test_lengths_are_read_and_written():
    assert [tokens(text) for text in ("8192", "8k", "2m", " 1K ")] == [8192, 8192, 1 << 21, 1024]
    assert lengths("128k,4k,4096") == [4096, 131072]
    assert [length_name(tokens) for tokens in (131072, 1000, 8192)] == ["128k", "1,000", "8k"]
