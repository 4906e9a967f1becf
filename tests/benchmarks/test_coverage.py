"""The coverage table: every attention of real architectures is found; how they are counted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.coverage import __main__ as coverage_command

pytest.importorskip("transformers")

from benchmarks.coverage import calls as coverage_calls
from benchmarks.coverage import measure as coverage_measure
from benchmarks.coverage import models as coverage_models
from benchmarks.coverage import table as coverage_table
from benchmarks.coverage import truth as coverage_truth

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch and transformers, about each other

ARCHITECTURES = {each.name: each for each in coverage_models.ARCHITECTURES}
REPRESENTATIVES = {
    "llama": ["sdpa"],
    "minimax": ["eager"],
    "bert": ["eager"],
    "deberta_v2": ["eager"],
    "xlnet": ["eager"],
    "wav2vec2": ["eager"],
}


def combinations():
    """Yield all architectures with all implementations; only representatives are not thorough."""
    for name in ARCHITECTURES:
        for implementation in coverage_measure.IMPLEMENTATIONS:
            quick = implementation in REPRESENTATIVES.get(name, [])
            marks = [] if quick else [pytest.mark.thorough]
            yield pytest.param(name, implementation, marks=marks, id=f"{name}-{implementation}")


@pytest.mark.parametrize(("name", "implementation"), list(combinations()))
def test_every_attention_is_found(name, implementation):
    architecture = ARCHITECTURES[name]
    if not architecture.offered:
        pytest.skip(f"this transformers has no {architecture.model_class}")
    results = coverage_measure.measure(architecture, implementation)
    if not any(result.seen for result in results) and all(result.note for result in results):
        if implementation in REPRESENTATIVES.get(name, []):
            pytest.fail(results[0].note)
        pytest.skip(results[0].note)
    assert all(result.seen or result.note for result in results)
    missed = [result for result in results if not result.complete]
    assert not missed, "\n".join(f"{each.phase}: {each.remark}\n{each.details}" for each in missed)


class Written(nn.Module):
    """Attention as written out, over hidden states [B, T, 8]."""

    def __init__(self):
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def heads(self, hidden):
        return (projection(hidden) for projection in self.projections)

    def forward(self, hidden):
        query, key, value = self.heads(hidden)
        return torch.softmax(query @ key.mT, -1) @ value


class WrittenAttention(Written):
    """The same, by a name that says so."""


class CallingAttention(Written):
    """Calls PyTorch's operator."""

    def forward(self, hidden):
        return F.scaled_dot_product_attention(*(each[:, None] for each in self.heads(hidden)))[:, 0]


class WrappingAttention(nn.Module):
    """An attention that holds another one, which alone counts."""

    def __init__(self):
        super().__init__()
        self.inner = WrittenAttention()

    def forward(self, hidden):
        return self.inner(hidden)


class LinearAttention(Written):
    """Linear attention, whose softmaxes run over features and over tokens, not over scores."""

    def forward(self, hidden):
        query, key, value = self.heads(hidden)
        return query.softmax(-1) @ (key.softmax(-2).mT @ value)


class Router(nn.Module):
    """A softmax over the scores of experts, which weighs what they say."""

    def __init__(self):
        super().__init__()
        self.scores = nn.Linear(8, 4)
        self.experts = nn.Linear(8, 32)

    def forward(self, hidden):
        said = self.experts(hidden).unflatten(-1, (4, 8))
        return (self.scores(hidden).softmax(-1)[..., None, :] @ said)[..., 0, :]


class Returned(Written):
    """Scores and a softmax, but no values."""

    def forward(self, hidden):
        query, key, _ = self.heads(hidden)
        return torch.softmax(query @ key.mT, -1)


class Model(nn.Module):
    """Three layers of a kind, with a residual stream."""

    def __init__(self, layer):
        super().__init__()
        self.layers = nn.ModuleList(layer().eval() for _ in range(3))

    def forward(self, hidden):
        for layer in self.layers:
            several = isinstance(layer, nn.MultiheadAttention)
            output = layer(hidden, hidden, hidden)[0] if several else layer(hidden)
            hidden = hidden + output.mean(-1, keepdim=True)
        return hidden


@pytest.mark.parametrize(
    ("layer", "called", "by_dataflow"),
    [
        (Written, None, 3),
        (WrittenAttention, "layers.{}", 3),
        (CallingAttention, "layers.{}", 3),
        (WrappingAttention, "layers.{}.inner", 3),
        (lambda: nn.MultiheadAttention(8, 2, batch_first=True), "layers.{}", 3),
        (LinearAttention, None, 0),
        (Router, None, 0),
        (Returned, None, 0),
    ],
)
@torch.no_grad()
def test_attentions_are_counted_in_two_ways(layer, called, by_dataflow):
    truth = coverage_truth.count_attentions(Model(layer), torch.randn(2, 5, 8))
    assert truth.names == (tuple(map(called.format, range(3))) if called else ())
    assert truth.by_dataflow == by_dataflow


class Broken(Written):
    """Attention with a graph break between its scores and its softmax, which no graph holds."""

    def forward(self, hidden):
        query, key, value = self.heads(hidden)
        scores = query @ key.mT
        torch._dynamo.graph_break()
        return torch.softmax(scores, -1) @ value


@pytest.mark.parametrize(("layer", "count"), [(Written, 3), (Broken, 0)])
@torch.no_grad()
def test_attentions_are_counted_in_graphs(layer, count):
    assert coverage_truth.count_in_graphs(Model(layer), torch.randn(2, 5, 8)) == count


@torch.no_grad()
def test_counting_leaves_everything_as_it_was():
    before = F.scaled_dot_product_attention
    model = ARCHITECTURES["llama"].build("sdpa")
    coverage_truth.count_attentions(
        model, **coverage_calls.arguments(model, ARCHITECTURES["llama"], "forward")
    )
    assert F.scaled_dot_product_attention is before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def result(architecture, implementation, there, found, **more):
    return coverage_measure.Result(
        architecture, implementation, "forward", there=there, found=found, **more
    )


RESULTS = [
    result("llama", "sdpa", 2, 2),
    result("llama", "eager", 2, 1),
    result("llama", "flex", 0, 0, note="no flex"),
    result("bert", "sdpa", 3, 3),
    result("bert", "eager", 4, 3, unseen=1, note="one unseen"),
    result("bert", "flex", 0, 0, note="no flex"),
]


def test_markdown_sums_and_explains():
    members = [ARCHITECTURES["llama"], ARCHITECTURES["bert"]]
    lines = coverage_table.markdown(members, RESULTS, "versions").splitlines()
    assert "| decoders (1) | 2/2 | **1/2** | – |" in lines
    assert "| **all** | 5/5 | **4/5** | – |" in lines
    assert "| llama | 2/2 | **1/2** | – <sup>1</sup> |" in lines
    assert "| bert | 3/3 | 3/3 <sup>2</sup> | – <sup>1</sup> |" in lines
    assert {"1. no flex", "2. one unseen"} < set(lines)
    assert coverage_table.total(RESULTS, 2).endswith("sdpa 5/5, eager 4/5, flex –; in all 9/10")


def test_table_goes_between_the_markers():
    page = f"above\n{coverage_table.BEGIN}\nold\n{coverage_table.END}\nbelow\n"
    page = coverage_table.replace_table(page, "new")
    assert page == f"above\n{coverage_table.BEGIN}\nnew\n{coverage_table.END}\nbelow\n"
    with pytest.raises(coverage_table.MarkersError, match="coverage:begin"):
        coverage_table.replace_table("above\nbelow\n", "new")


@pytest.fixture
def command():
    """The command, as a module."""
    return coverage_command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "lama"], "lama"),
        (["--implementations", "flash"], "flash"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--only", "llama", "--update-docs"], "needs the whole table"),
        (["--update-docs", "nowhere.md"], "nowhere.md"),
    ],
)
def test_wrong_arguments_are_named(command, capsys, arguments, words):
    with pytest.raises(SystemExit) as exit_:
        command.main(arguments)
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err


def test_a_miss_is_an_exit_status(command, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "in_processes", lambda tasks, jobs: iter([RESULTS[:3]]))
    written = tmp_path / "table.md"
    assert command.main(["--only", "llama", "--markdown", str(written)]) == 1
    assert "**1/2**" in written.read_text()
    assert "sdpa 2/2, eager 1/2" in capsys.readouterr().out
    monkeypatch.setattr(command, "in_processes", lambda tasks, jobs: iter([RESULTS[:1]]))
    assert command.main(["--only", "llama", "--implementations", "sdpa"]) == 0


@pytest.mark.thorough
def test_the_command_in_processes(command, capsys):
    assert command.main(["--only", "vit", "bert", "--implementations", "sdpa", "--jobs", "2"]) == 0
    assert "2 architectures: sdpa 4/4" in capsys.readouterr().out
