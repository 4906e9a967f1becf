"""The parts of the demo: what is asked, what was read, what is shown; and all of it, in small."""

from __future__ import annotations

import dataclasses
import io
import random

import pytest
import torch
from rich.console import Console

from examples.long_document import answers
from examples.long_document.__main__ import main
from examples.long_document.answers import Measured, Recording, decode_steps
from examples.long_document.lookup import make_model, make_tokenizer
from examples.long_document.picture import draw
from examples.long_document.prompt import Prompt
from examples.long_document.reading import Reading
from examples.long_document.task import (
    EXPECTED,
    FACT,
    OTHERS,
    QUESTION_FOR_FACT,
    first_paragraphs,
    plant,
    with_others,
)
from examples.long_document.view import show_answers, show_steps, show_times
from lychee_compile import Options
from lychee_compile.recorder import Call

PNG = b"\x89PNG\r\n\x1a\n"


class Letters:
    """A tokenizer: a letter is a token."""

    def __call__(self, text, **_):
        return self.Encoded([ord(letter) for letter in text])

    def decode(self, ids, **_):
        return "".join(map(chr, ids))

    class Encoded:
        def __init__(self, input_ids):
            self.input_ids = input_ids


def call(site, kv_len, *read):
    """Return a call of one KV head that read the slots `read`, from chunks of 4."""
    starts = torch.arange(0, kv_len, 4)[None]
    return Call(
        site=site,
        kv_len=kv_len,
        tokens=torch.tensor([*read, -1]).view(1, 1, 1, -1),
        chunk_starts=starts,
        chunk_lengths=torch.clamp(kv_len - starts, max=4),
        mass=torch.tensor([[[0.75], [0.5]]]),
    )


@pytest.mark.parametrize("separator", ["\n\n", "\n", " "])
def test_fact_is_planted_at_the_break_nearest_to_the_middle(separator):
    document = separator.join(["one", "two", "three", "four"])
    planted, start = plant(document, "FACT")
    assert planted == f"one{separator}two\n\nFACT\n\nthree{separator}four"
    assert planted[start : start + 4] == "FACT"


def test_fact_is_planted_in_a_single_word():
    assert plant("abcd", "FACT") == ("ab\n\nFACT\n\ncd", 4)


def test_a_break_far_from_the_middle_is_not_the_middle():
    document = "title\n\n" + "word " * 50
    _, start = plant(document, "FACT")
    assert abs(start - len(document) / 2) < 10


def test_default_document_is_cut_between_paragraphs():
    assert first_paragraphs("one\n\ntwo\n\nthree", Letters(), 5 + 5 + 6) == "one\n\ntwo"


def test_calls_are_grouped_by_step():
    calls = [call(site, 8, 0) for site in ("a", "b", "a", "b", "a")]
    steps = decode_steps(calls)
    assert [[each.site for each in step] for step in steps] == [["a", "b"], ["a", "b"], ["a"]]
    assert decode_steps([]) == []


def test_reading_counts_the_heads_that_read_a_chunk():
    steps = [[call("a", 11, 0, 1, 5), call("b", 11, 1, 2)], [call("a", 12, 11), call("b", 12, 0)]]
    reading = Reading.of(steps)
    assert reading.edges.tolist() == [0, 4, 8, 12]
    assert reading.counts.tolist() == [[2, 1, 0], [1, 0, 1]]
    assert reading.readers == 2
    assert reading.most_read_at(4, 12) == 1
    assert reading.most_read(0, 12, 1, first=[]) == [0]
    assert reading.most_read(4, 12, 9, first=[]) == [1, 2]
    assert reading.most_read(0, 12, 9, first=[2])[-1] == 2


@pytest.fixture
def recording():
    """Two steps over a document of 96 letters, some of which mean something to matplotlib."""
    document = torch.tensor([[ord("$"), *range(33, 128)]])
    prompt = Prompt(document, torch.tensor([[ord("?")]]), range(40, 44))
    steps = [[call("layers.0", 97, 0, 41, 96)], [call("layers.0", 98, 0, 20, 97)]]
    return Recording(prompt, answer=[ord("4"), ord("8")], steps=steps)


def test_picture_is_a_png(tmp_path, recording):
    draw(tmp_path / "picture", recording, Letters(), Options())
    assert (tmp_path / "picture").read_bytes().startswith(PNG)


def without_chunks(each):
    """Return a call as generated kernels record it."""
    nothing = torch.zeros(1, 0, dtype=torch.int64)
    return dataclasses.replace(each, chunk_starts=nothing, chunk_lengths=nothing)


@pytest.mark.parametrize("recorded", [1, 2])
def test_steps_as_kernels_record_them(tmp_path, recording, recorded):
    """The first steps on a GPU are exact, hence not recorded, and kernels tell no chunks."""
    steps = [[without_chunks(each) for each in step] for step in recording.steps[-recorded:]]
    last = dataclasses.replace(recording, steps=steps)
    assert last.decoded == recording.decoded[-recorded:]
    assert last.tokens == recording.tokens
    assert last.asked == recorded - 1
    assert Reading.of(steps).edges.tolist() == [*range(0, 98, 16), 98]
    assert "'4' 3 98 3.1%" in shown(show_steps, last, Letters())
    draw(tmp_path / "picture", last, Letters(), Options())


def shown(show, *arguments):
    """Return the text that a function of the view writes."""
    page = io.StringIO()
    show(Console(file=page, width=120), *arguments)
    return " ".join(page.getvalue().split())


def test_steps_show_tokens_read_and_mass(recording):
    page = shown(show_steps, recording, Letters())
    assert "0 '?' 3 97 3.1% 0.625 0.500 layer 0, head 1" in page
    assert "1 '4' 3 98 3.1%" in page


@pytest.mark.parametrize(
    ("sparse", "expected"),
    [
        ("48213.", "identical, 6 tokens"),
        ("48113.", "part at token 2: '2' and '1'"),
        ("48213", "part at token 5: '.' and the end"),
    ],
)
def test_answers_show_where_they_part(sparse, expected):
    measured = {
        name: Measured(list(map(ord, text)), 3.0, 1.0, 0.1, 5)
        for name, text in (("dense", "48213."), ("sparse", sparse))
    }
    page = shown(show_answers, Letters(), measured, "48213")
    assert f"Token streams: {expected}" in page
    assert page.count("fact found") + page.count("fact missed") == 2
    assert ("fact missed" in page) == ("48213" not in sparse)


@pytest.mark.parametrize(("seconds", "speed"), [(0.02, "2.00x"), (0.05, "0.80x")])
def test_times_compare_with_the_fastest_dense_way(recording, seconds, speed):
    measured = {
        name: Measured([1], 3.0, 1.0, each, 5)
        for name, each in (("eager", 0.04), ("inductor", 0.08), ("sparse", seconds))
    }
    page = shown(show_times, measured, recording)
    assert "eager 40.0 ms" in page
    assert "0.50x" in page
    assert f"sparse {seconds * 1000:.1f} ms 3.1% {speed}" in page
    assert ("try a longer document" in page) == (seconds > 0.04)


def test_other_keys_are_spread_over_the_document():
    document = with_others("\n\n".join(f"Paragraph {number}." for number in range(90)))
    places = [document.index(f"the pass key of the {place} is".capitalize()) for place in OTHERS]
    assert places == sorted(places)
    assert places[0] < len(document) / 10 < len(document) * 0.9 < places[-1]
    assert EXPECTED not in document


@pytest.mark.parametrize("place", ["lighthouse", "castle"])
def test_the_lookup_model_answers(seeded, place):
    """Dense attention of the demo's model finds one of many facts of one form."""
    text = "\n\n".join(f"Names refer to objects, number {number}." for number in range(60))
    document = plant(with_others(text), FACT)[0]
    question = QUESTION_FOR_FACT.replace("lighthouse", place)
    tokenizer = make_tokenizer([text, *OTHERS, "light", "house"])
    ids = tokenizer(document + question, return_tensors="pt").input_ids
    answer = make_model().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6)
    expected = document.partition(f"pass key of the {place} is ")[2][:5]
    assert tokenizer.decode(answer[0, ids.shape[1] :]).strip() == expected


@pytest.fixture
def model(tmp_path):
    """A folder with a random model of two layers and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(1, 100)} | {"<unk>": 0, ".": 100}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("budget", [pytest.param(96, marks=pytest.mark.thorough), 2048])
def test_all_of_it(tmp_path, capsys, monkeypatch, without_inductor, model, budget):
    """A random model finds nothing, but with a budget that covers all it says what dense says."""
    monkeypatch.setattr(answers, "DENSE_BACKEND", "aot_eager")
    rng = random.Random(0)
    document = tmp_path / "document.txt"
    document.write_text(" ".join(f"w{rng.randrange(1, 100)}" for _ in range(500)))
    picture = tmp_path / "picture.png"
    arguments = ["--document", document, "--model", model, "--budget", budget]
    arguments += ["--new-tokens", 6, "--output", picture]
    assert main([str(each) for each in arguments]) == 0
    page = capsys.readouterr().out
    sparse = budget < 500
    assert ("2 sparse" in page) == sparse
    assert ("no attention was sparse" in page) == (not sparse)
    assert picture.exists() == sparse
    assert ("identical, 6 tokens" in page) or sparse
