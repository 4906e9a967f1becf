"""The table of other libraries: how classes are tried, on a toy library that is not installed."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from benchmarks.coverage.libraries import __main__ as libraries_command
from benchmarks.coverage.libraries import install, table, trial, worker
from benchmarks.coverage.libraries.catalogue import LIBRARIES
from benchmarks.coverage.libraries.entries import Entry, Library, Made, Named, floats, resolved

pytestmark = pytest.mark.filterwarnings("ignore")


class Attention(nn.Module):
    """Attention by hand, of `keys` tokens."""

    def __init__(self, keys=6):
        super().__init__()
        self.keys = keys
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def weights(self, scores):
        return scores.softmax(-1)

    def forward(self, hidden):
        seen = hidden[:, : self.keys]
        scores = self.query(hidden) @ self.key(seen).mT / 8**0.5
        return self.weights(scores) @ self.value(seen)


class ByExponentials(Attention):
    """The same softmax, written out."""

    def weights(self, scores):
        raised = (scores - scores.amax(-1, keepdim=True)).exp()
        return raised / raised.sum(-1, keepdim=True)


class MixedHeads(Attention):
    """Attention whose weights pass through a small parameter, as talking heads do."""

    def __init__(self):
        super().__init__()
        self.mixing = nn.Parameter(torch.eye(2))

    def forward(self, hidden):
        query, key, value = (
            each(hidden).unflatten(-1, (2, 4)).transpose(1, 2)
            for each in (self.query, self.key, self.value)
        )
        weights = torch.einsum("bhqk,hg->bgqk", (query @ key.mT).softmax(-1), self.mixing)
        return weights @ value


class Random(Attention):
    """Attention whose output differs from call to call."""

    calls = 0

    def forward(self, hidden):
        Random.calls += 1
        return super().forward(hidden) + Random.calls


class Unready(nn.Module):
    """A class that cannot be called."""

    def forward(self, hidden):
        raise ValueError("not this\nway")


def entry(layer, *arguments):
    return Entry(
        layer.__name__, Made(f"{__name__}.{layer.__name__}", *arguments), [floats(2, 6, 8)]
    )


@pytest.mark.parametrize(
    ("layer", "arguments", "there", "single", "found"),
    [
        (Attention, (), 1, 0, True),
        (Attention, (1,), 0, 1, None),
        (ByExponentials, (), 1, 0, True),
        (MixedHeads, (), 1, 0, None),
    ],
)
def test_attentions_are_counted(layer, arguments, there, single, found):
    outcome = trial.attempt("toy", entry(layer, *arguments))
    assert (outcome.note, outcome.failure) == ("", "")
    assert (outcome.there, outcome.single) == (there, single)
    assert not outcome.wrong
    assert outcome.breaks == 0
    if found:
        assert (outcome.found, outcome.rewritten, outcome.good) == (1, 1, True), outcome.kept


@pytest.mark.parametrize(("layer", "words"), [(Unready, "ValueError: not this"), (Random, "other")])
def test_a_class_that_cannot_be_tried_says_why(layer, words):
    outcome = trial.attempt("toy", entry(layer))
    assert words in outcome.note
    assert "way" not in outcome.note


def test_an_error_of_the_backend_is_a_failure(monkeypatch):
    def broken(graph, inputs, **options):
        raise RuntimeError("of ours")

    monkeypatch.setattr(trial.backend, "lychee", broken)
    outcome = trial.attempt("toy", entry(Attention))
    assert "of ours" in outcome.failure
    assert not outcome.good


def test_another_output_is_wrong(monkeypatch):
    monkeypatch.setattr(
        trial.backend, "lychee", lambda graph, inputs, **_: lambda *args: (graph(*args)[0] + 1,)
    )
    outcome = trial.attempt("toy", entry(Attention))
    assert outcome.wrong
    assert outcome.missed == 1


def test_specifications_are_resolved_at_any_depth():
    made = resolved({"a": [Made("argparse.Namespace", b=floats(2))], "c": (Named("math.pi"),)})
    assert made["a"][0].b.shape == (2,)
    assert made["c"][0] > 3


def test_names_are_unique():
    for library in LIBRARIES:
        names = [each.name for each in library.entries]
        assert len(set(names)) == len(names), library.name


def test_versions_are_those_of_the_folder(tmp_path):
    info = tmp_path / "open_clip_torch-3.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: open_clip_torch\nVersion: 3.0\n")
    assert install.version("open-clip-torch", tmp_path) == "3.0"
    assert install.version("absent", tmp_path) == ""
    assert install.install(["open_clip_torch"], tmp_path) == ""  # nothing is lacking


TRIALS = [
    trial.Trial("toy", "Good", there=3, found=3, rewritten=2, kept={"a reason": 1}),
    trial.Trial("toy", "Bad", there=2, found=1, error=1.0, rejected={"another": 1}),
    trial.Trial("other", "Absent", note="it is not there"),
]
TOY = Library("toy", ["toy"], [entry(Attention), entry(ByExponentials)])


def test_the_table_tells_faults():
    lines = table.markdown(TRIALS, {"toy": "1.2"}, "remark").splitlines()
    assert lines[0].startswith(
        "2 builds of model classes of 1 libraries, 2 of them with attention: 4 of 5"
    )
    assert "| toy 1.2 | 2 | **4/5** |  | 2 |" in lines
    assert "| Bad | **1/2** |  | 0 | 1 missed; error 1.0e+00 |" in lines
    assert {"| 1 | a reason |", "| 1 | another |"} < set(lines)
    assert "1 missed" in table.line(TRIALS[1]).plain


def test_outcomes_are_kept_and_not_tried_again(monkeypatch, tmp_path, capsys):
    tried = []

    def trials(tasks, folder, **_):
        for library, name in tasks:
            tried.append(name)
            yield trial.Trial(library, name, there=1, found=1)

    monkeypatch.setattr(libraries_command, "LIBRARIES", (TOY,))
    monkeypatch.setattr(libraries_command, "trials", trials)
    arguments = ["--folder", str(tmp_path)]
    assert libraries_command.main([*arguments, "--classes", "By"]) == 0
    assert libraries_command.main([*arguments, "--known"]) == 0
    assert tried == ["ByExponentials"]
    assert libraries_command.main(arguments) == 0
    assert tried == ["ByExponentials", "Attention"]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
    page = tmp_path / "page.md"
    page.write_text(f"{table.BEGIN}\n{table.END}\n")
    assert libraries_command.main([*arguments, "--update-docs", str(page)]) == 0
    assert "2 of 2 attentions" in page.read_text()
    assert "2 of 2 attentions" in " ".join(capsys.readouterr().out.split())


def test_a_miss_is_an_exit_status(monkeypatch, tmp_path):
    results = tmp_path / "results.jsonl"
    outcomes = [trial.Trial("toy", each.name, there=2, found=1) for each in TOY.entries]
    results.write_text("".join(json.dumps(each.to_dict()) + "\n" for each in outcomes))
    monkeypatch.setattr(libraries_command, "LIBRARIES", (TOY,))
    assert libraries_command.main(["--folder", str(tmp_path)]) == 1


def test_docs_need_the_whole_table(capsys):
    with pytest.raises(SystemExit):
        libraries_command.main(["--update-docs", "--classes", "ViT"])
    assert "needs the whole table" in capsys.readouterr().err


@pytest.mark.thorough
def test_a_process_that_serves_answers(tmp_path):
    library = LIBRARIES[0]
    tasks = [(library.name, library.entries[0].name)]
    (outcome,) = worker.trials(tasks, tmp_path, inductor=False, limit=120)
    assert "ModuleNotFoundError" in outcome.note  # nothing is installed in the folder
