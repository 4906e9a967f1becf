"""The example of a policy of one's own, and what registering one refuses."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import pytest

import lychee_compile
from lychee_compile import extend
from lychee_compile.kernels.policies import registry as policies
from lychee_compile.kernels.policies.registry import index_class
from lychee_compile.kernels.reference.index import KVIndex

QuestIndex = index_class("quest")


@pytest.fixture
def registry(monkeypatch):
    """The registered policies, as they were when the test is over."""
    monkeypatch.setattr(policies, "_policies", dict(policies._policies))


@pytest.mark.usefixtures("registry", "uncompiled_graphs", "seeded")
def test_the_example_reads_more_than_a_window(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    errors = importlib.import_module("custom_policy").main()
    assert errors["streaming"] > errors["gaussian"] > 0
    assert errors["streaming"] > errors["lychee"] > 0


def test_the_example_can_be_copied_alone():
    """It imports PyTorch, this package and its public face for extenders."""
    tree = ast.parse(
        (Path(__file__).parents[2] / "examples" / "custom_policy.py").read_text("utf-8")
    )
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {
        each.name for node in ast.walk(tree) if isinstance(node, ast.Import) for each in node.names
    }
    own = {name for name in imported if name.startswith("lychee_compile")}
    assert own == {"lychee_compile", "lychee_compile.extend"}
    others = {name.partition(".")[0] for name in imported - own}
    assert others - set(sys.stdlib_module_names) == {"torch"}


def test_what_extenders_need_has_one_home():
    for name in extend.__all__:
        assert getattr(extend, name) is not None
    assert extend.register_policy is lychee_compile.register_policy
    assert extend.KVIndex is KVIndex


@pytest.mark.usefixtures("registry")
def test_every_policy_says_what_it_does():
    lychee_compile.register_policy("mine", QuestIndex, words="pages")
    lychee_compile.register_policy("mine", QuestIndex, tiles=lambda question: question.candidates)
    for policy in policies.policies():
        assert policy.words
        assert policy.index or policy.prefill
    mine = policies.find_policy("mine")
    assert (mine.words, mine.index, mine.dense_layers) == ("pages", QuestIndex, 2)
    assert mine.prefill is not None
    assert policies.find_policy("dhsa").dense_layers == 0
    assert policies.find_policy("qest") is None


@pytest.mark.usefixtures("registry")
def test_a_policy_has_a_name_of_its_own():
    lychee_compile.register_policy("mine", QuestIndex)
    lychee_compile.register_policy("mine", QuestIndex)
    assert "mine" in policies.policy_names()
    assert lychee_compile.Options(policy="mine").policy == "mine"
    with pytest.raises(ValueError, match="there is a policy 'lychee' already: 'single tokens"):
        lychee_compile.register_policy("lychee", QuestIndex)


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("index", [QuestIndex.extend, dict, "quest"])
def test_only_a_class_of_indexes_is_a_policy(index):
    with pytest.raises(TypeError, match="a policy is a LevelStack or a subclass of KVIndex"):
        lychee_compile.register_policy("mine", index)


@pytest.mark.usefixtures("registry")
def test_a_policy_defines_all_it_must():
    class Half(KVIndex):
        def choose(self, question):
            return question.begin, question.end

    with pytest.raises(TypeError, match="Half does not define bytes_per_step, extend"):
        lychee_compile.register_policy("half", Half)


def test_an_unknown_policy_is_named():
    with pytest.raises(lychee_compile.options.OptionError, match="did you mean 'quest'"):
        lychee_compile.Options(policy="qest")
    with pytest.raises(ValueError, match="unknown policy 'qest'; known are lychee, "):
        policies.index_class("qest")
