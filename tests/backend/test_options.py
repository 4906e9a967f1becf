"""Options: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._inductor import list_mode_options

from lychee_compile import options as options_module
from lychee_compile.boundaries import BoundaryTable
from lychee_compile.kernels.config import BOUNDARIES, IndexConfig
from lychee_compile.kernels.policies.registry import find_policy, policy_names
from lychee_compile.options import OptionError, Options

STRENGTHS = torch.tensor([0, 1, 2, 3, 4], dtype=torch.uint8)
NAMES = [each.name for each in dataclasses.fields(Options)]


class CountingTokenizer:
    """Tokenizer with just what a table needs; counts how often the vocabulary is read."""

    def __init__(self):
        self.reads = 0

    def get_vocab(self):
        self.reads += 1
        return {"a": 0, ".": 1, "\n\n": 2}


class UnhashableTokenizer(CountingTokenizer):
    __hash__ = None


def test_defaults_are_those_of_the_index():
    assert Options().index_config() == IndexConfig()
    assert Options.parse(None, None) == Options() == Options.parse(None, {})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"bugdet": 512}, ["bugdet", "did you mean 'budget'", *NAMES]),
        ({"zzz": 1}, ["zzz", *NAMES]),
        ({"budget": "1024"}, ["budget", "'1024'", "str", "integer", "None"]),
        ({"budget": True}, ["budget", "True", "bool"]),
        ({"budget": 1024.0}, ["budget", "1024.0", "float"]),
        ({"coverage": 0}, ["coverage=0", "above 0 and up to 1, or None"]),
        ({"coverage": 1.01}, ["coverage=1.01", "up to 1"]),
        ({"coverage": True}, ["coverage=True", "bool", "up to 1"]),
        ({"coverage": "0.9"}, ["coverage='0.9'", "str"]),
        ({"coverage": 0.9, "epsilon": 0.1}, ["coverage=0.9", "epsilon=0.1", "one of them"]),
        ({"prefill_coverage": 0.9, "epsilon": 0.1}, ["prefill_coverage=0.9", "draws no keys"]),
        ({"budget": 80}, ["budget=80", "sinks (16)", "recent (64)", "81", "None"]),
        ({"budget": 79, "policy": "streaming"}, ["budget=79", "at least 81"]),
        ({"budget": 0}, ["budget=0", "at least 1"]),
        ({"sinks": -1}, ["sinks=-1", "at least 0"]),
        ({"recent": 0}, ["recent=0", "at least 1"]),
        ({"recent": 15}, ["recent=15", "chunk=(8, 16)"]),
        ({"chunk": 8}, ["chunk=8", "shortest", "longest", "256"]),
        ({"chunk": (16, 8)}, ["chunk=(16, 8)"]),
        ({"chunk": (0, 8)}, ["chunk=(0, 8)"]),
        ({"chunk": (8, 257), "recent": 512}, ["chunk=(8, 257)", "256"]),
        ({"chunk": (8, 12, 16)}, ["chunk=(8, 12, 16)", "two integers"]),
        ({"chunk": (8, True)}, ["chunk=(8, True)"]),
        ({"cluster_chunks": 0}, ["cluster_chunks=0", "at least 1"]),
        ({"coarse_units": 0}, ["coarse_units=0"]),
        ({"overfetch": 0.5}, ["overfetch=0.5", "float"]),
        ({"seed": "7"}, ["seed='7'", "str"]),
        ({"seed": 2**63}, ["seed", "at most"]),
        ({"boundaries": "token"}, ["boundaries='token'", *BOUNDARIES, "did you mean 'tokens'"]),
        ({"boundaries": "tokens"}, ["tokenizer", "BoundaryTable", "similarity"]),
        ({"policy": "lyche"}, ["policy='lyche'", *policy_names()]),
        ({"policy": ["lychee"]}, ["policy=['lychee']", "list"]),
        ({"mode": "reduce-overheat"}, ["mode", "did you mean 'reduce-overhead'", "max-autotune"]),
        ({"strict": 1}, ["strict=1", "True or False"]),
        ({"prefill": "dense"}, ["prefill='dense'", "'exact'", "'sparse'"]),
        ({"prefill_budget": 1.5}, ["prefill_budget=1.5", "a share above 0 and up to 1.0"]),
        ({"prefill_budget": 0}, ["prefill_budget=0", "at least 1"]),
        ({"prefill_from": -1}, ["prefill_from=-1", "at least 0"]),
        ({"tokenizer": "gemma"}, ["tokenizer", "str", "get_vocab", "BoundaryTable"]),
        ({"tokenizer": torch.zeros(4)}, ["tokenizer", "uint8", "float32"]),
        ({"tokenizer": STRENGTHS[None]}, ["tokenizer", "[vocab]", "[1, 5]"]),
        ({"inductor": True}, ["inductor=True", "mapping"]),
        ({"inductor": {"max_autotun": True}}, ["max_autotun", "did you mean 'max_autotune'"]),
    ],
)
def test_a_mistake_is_named(given, words):
    with pytest.raises(OptionError) as direct:
        Options(**given)
    with pytest.raises(OptionError) as parsed:
        Options.parse(None, given)
    assert str(direct.value) == str(parsed.value)
    assert "\n" not in str(direct.value)
    assert [word for word in words if word not in str(direct.value)] == []


def test_an_option_error_is_a_value_error():
    assert issubclass(OptionError, ValueError)


@given(st.text().filter(lambda name: name not in NAMES))
def test_no_unknown_name_passes(name):
    with pytest.raises(OptionError, match="unknown option") as caught:
        Options.parse(None, {name: 1})
    assert repr(name) in str(caught.value)


@given(
    budget=st.none() | st.integers(-2, 200),
    sinks=st.integers(-1, 40),
    recent=st.integers(-1, 80),
    shortest=st.integers(-1, 40),
    longest=st.integers(-1, 40),
    policy=st.sampled_from(policy_names()),
)
def test_sizes_are_accepted_exactly_where_they_fit(
    budget, sinks, recent, shortest, longest, policy
):
    spare = 0 if policy == "streaming" else 1
    levels = find_policy(policy).levels
    least = 0 if levels is None else levels.least_budget(max(sinks, 0), max(recent, 1))
    fits = (
        sinks >= 0
        and recent >= 1
        and 1 <= shortest <= longest <= recent
        and (budget is None or budget >= max(sinks + recent + spare, least))
    )
    given = {"budget": budget, "sinks": sinks, "recent": recent, "policy": policy}
    given["chunk"] = [shortest, longest]
    if not fits:
        with pytest.raises(OptionError):
            Options.parse(None, given)
        return
    config = Options.parse(None, given).index_config()
    assert type(config) is IndexConfig
    assert config == IndexConfig(**{**given, "chunk": (shortest, longest)})


@pytest.mark.parametrize("mode", list_mode_options())
def test_every_inductor_mode_is_taken(mode):
    assert Options(mode=mode).mode == mode
    assert Options.parse(mode, None) == Options.parse(None, {"mode": mode})
    assert Options.parse(mode, {"mode": mode}).mode == mode
    assert Options.parse(mode, {"mode": None}).mode == mode


def test_two_modes_contradict():
    with pytest.raises(OptionError, match=r"max-autotune.*reduce-overhead"):
        Options.parse("max-autotune", {"mode": "reduce-overhead"})


def test_values_are_normalised():
    numpy = pytest.importorskip("numpy")
    made = Options(budget=numpy.int64(512), chunk=[numpy.int32(4), 8], inductor={})
    assert (made.budget, made.chunk) == (512, (4, 8))
    assert type(made.budget) is type(made.chunk[0]) is int


def test_options_are_values():
    first = Options(tokenizer=STRENGTHS.clone(), inductor={"max_autotune": True})
    second = Options(tokenizer=BoundaryTable(STRENGTHS), inductor={"max_autotune": True})
    assert first == second
    assert hash(first) == hash(second)
    assert copy.deepcopy(first) is first
    assert pickle.loads(pickle.dumps(first)) == first
    assert first != Options(tokenizer=STRENGTHS.flip(0), inductor={"max_autotune": True})
    assert first != dataclasses.replace(first, inductor={})
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.budget = 7


def test_patches_are_copied():
    patches = {"max_autotune": True}
    made = Options(inductor=patches)
    patches["max_autotune"] = False
    assert made.inductor == {"max_autotune": True}


def test_replacing_validates_again():
    with pytest.raises(OptionError, match="budget=10"):
        dataclasses.replace(Options(), budget=10)


def test_no_tokenizer_no_table():
    assert Options().boundary_table() is None


def test_a_tokenizer_is_read_once():
    tokenizer = CountingTokenizer()
    tables = [Options(tokenizer=tokenizer, budget=200 + n).boundary_table() for n in range(26)]
    assert tokenizer.reads == 1
    assert all(table is tables[0] for table in tables)
    assert tables[0].strengths.tolist() == [0, 2, 4]


def test_a_dropped_tokenizer_is_forgotten():
    before = len(options_module._tables)
    made = Options(tokenizer=CountingTokenizer())
    made.boundary_table()
    assert len(options_module._tables) == before + 1
    del made
    gc.collect()
    assert len(options_module._tables) == before


def test_a_tokenizer_need_not_be_hashable():
    table = Options(tokenizer=UnhashableTokenizer()).boundary_table()
    assert table.strengths.tolist() == [0, 2, 4]
