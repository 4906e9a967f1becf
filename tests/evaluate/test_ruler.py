"""Tasks after RULER: what is asked has one answer in the text, and texts have the length asked."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

from evaluated import byte_tokenizer, tiny_language_model

from lychee_compile.evaluate.errors import EvaluationError
from lychee_compile.evaluate.models import prefill
from lychee_compile.evaluate.reading import (
    Encoded,
    answer_densely,
    answer_sparsely,
    encode,
    found_share,
)
from lychee_compile.evaluate.ruler.catalogue import RULER
from lychee_compile.evaluate.ruler.problem import SHARES, fit
from lychee_compile.evaluate.ruler.questions import chat_frame, ruler_question
from lychee_compile.evaluate.ruler.words import invented, planted, sentences
from lychee_compile.evaluate.task_questions import make_questions
from lychee_compile.evaluate.tasks import run_tasks
from lychee_compile.evaluate.variants import parse_variants

SEEDS = st.integers(0, 10**9).map(str)
DEPTHS = st.floats(0, 1)
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def characters(texts):
    return [len(text) for text in texts]


def words(texts):
    """Count words and marks, as a tokenizer of a large vocabulary does."""
    return [len(re.findall(r"\w+|[^\w\s]", text)) for text in texts]


def digits(texts):
    """Count words and single digits."""
    return [len(re.findall(r"[^\W\d]+|[^\w\s]|\d", text)) for text in texts]


@pytest.mark.parametrize("task", RULER)
@given(
    seed=SEEDS,
    depth=DEPTHS,
    tokens=st.integers(4096, 20_000),
    count=st.sampled_from([characters, words, digits]),
)
def test_a_problem_holds_its_answers_and_has_the_length_asked(task, seed, depth, tokens, count):
    problem = fit(RULER[task], tokens, depth, seed, count)
    (length,) = count([problem.text])
    assert SHARES[0] * tokens <= length <= tokens
    assert SHARES[0] >= 0.95
    assert problem == fit(RULER[task], tokens, depth, seed, count)
    assert len(set(problem.answers)) == len(problem.answers)
    for answer in problem.answers:
        assert answer in problem.document
        assert answer not in problem.question + problem.lead
        assert found_share(problem.answer, [answer]) == 1
    once = {"single-key", "multi-key", "many-keys", "multi-value", "multi-query"}
    if task in once:
        assert all(problem.document.count(answer) == 1 for answer in problem.answers)
    if task in {"single-key", "multi-key", "many-keys", "planted-facts"}:
        (answer,) = problem.answers
        place = problem.document.index(answer) / len(problem.document)
        assert place == pytest.approx(depth, abs=0.12)


@given(seed=SEEDS, depth=DEPTHS)
def test_needles_are_those_of_the_keys_asked(seed, depth):
    chance = random.Random(seed)
    for task in ("single-key", "multi-key", "many-keys", "multi-value", "multi-query"):
        problem = RULER[task](80, random.Random(chance.random()), depth)
        needles = re.findall(r"magic numbers for (\w+) is: (\d+)\.", problem.document)
        keys = re.findall(r"[a-z]{8}", problem.lead)
        asked = [value for key in keys for name, value in needles if name == key]
        assert sorted(asked) == sorted(problem.answers)
        assert len(needles) == {"single-key": 1, "many-keys": 81}.get(task, 4)


@given(seed=SEEDS, depth=DEPTHS)
def test_variables_lead_back_to_the_value_asked(seed, depth):
    problem = RULER["variable-tracking"](60, random.Random(seed), depth)
    values = {}
    for name, variable, number in re.findall(
        r"VAR (\w+) = (?:VAR (\w+)|(\d+))\.", problem.document
    ):
        values[name] = values[variable] if variable else number  # in order: none is unknown
    value = re.search(r"value (\d+)", problem.question)[1]
    assert [name for name in values if values[name] == value] == list(problem.answers)
    assert len(problem.answers) == 5


@given(seed=SEEDS, size=st.integers(60, 400))
def test_words_asked_are_the_most_frequent(seed, size):
    for task in ("common-words", "frequent-words"):
        problem = RULER[task](size, random.Random(seed), 0.5)
        text = problem.document.partition("\n\n")[2]
        ranked = Counter(re.findall(r"[a-z]+", text)).most_common()
        asked = len(problem.answers)
        assert {word for word, _ in ranked[:asked]} == set(problem.answers)
        assert ranked[asked - 1][1] > ranked[asked][1]


@given(seed=SEEDS, depth=DEPTHS)
def test_facts_answer_their_question(seed, depth):
    found = r"(\w+) was born in (\w+) and became a \w+\. \w+ learnt from (\w+)"
    for task in ("planted-facts", "planted-hops"):
        problem = RULER[task](30, random.Random(seed), depth)
        people = {name: (town, teacher) for name, town, teacher in
                  re.findall(found, problem.document)}  # fmt: skip
        asked = re.search(r"(\w+) born\?", problem.question)[1]
        if task == "planted-hops":
            asked = people[asked][1]
        assert problem.answers == (people[asked][0],)


def test_invented_words_hold_no_other():
    found = invented(random.Random(1), 3000)
    assert len(set(found)) == 3000
    assert {len(word) for word in found} == {6}
    assert not any(word in sentence.lower() for word in found[:200] for sentence in sentences())


@given(depth=st.none() | DEPTHS, seed=st.integers())
def test_planted_facts_keep_their_order(depth, seed):
    text = planted(["a"] * 9, ["X", "Y", "Z"], random.Random(seed), depth)
    assert sorted(text.split()) == sorted([*"XYZ", *"a" * 9])
    if depth is None:
        assert re.sub("[ a]", "", text) == "XYZ"


@pytest.mark.parametrize("task", RULER)
def test_too_short_a_length_is_refused(task):
    with pytest.raises(EvaluationError, match=f"--length 40: too short for {task}"):
        ruler_question(task, 40, 0.5, "0", characters)


def test_a_chat_template_frames_document_and_question():
    tokenizer = byte_tokenizer()
    assert chat_frame(tokenizer) is None
    tokenizer.chat_template = TEMPLATE
    frame = chat_frame(tokenizer)
    assert frame == ("<|user|>", "<|end|><|assistant|>")
    question = ruler_question("multi-key", 4096, 0.4, "7", characters, frame)
    plain = ruler_question("multi-key", 4096, 0.4, "7", characters)
    assert question.document.startswith("<|user|>Special magic numbers")
    assert "?<|end|><|assistant|>The special magic number" in question.question
    assert plain.question.endswith(question.question.rpartition("|>")[2])
    assert (question.framed, plain.framed) == (True, False)
    whole = question.document + question.question + question.answer
    assert 0.95 * 4096 < len(whole) <= 4096


@pytest.mark.parametrize("template", ["{{ raise_exception('no users') }}", "nothing of a message"])
def test_a_template_that_takes_no_message_is_left_out(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    assert chat_frame(tokenizer) is None


def test_a_framed_document_gets_no_second_special_tokens():
    model = tiny_language_model()
    given = []
    tokenizer = model.tokenizer

    class Noting:
        def __call__(self, text, add_special_tokens=True):
            given.append(add_special_tokens)
            return tokenizer(text, add_special_tokens=add_special_tokens)

    question = ruler_question("single-key", 1024, 0.5, "0", words, ("<", ">"))
    encode(question, replace(model, tokenizer=Noting()))
    assert given == [False, False, False]


@pytest.fixture(scope="module")
def model():
    return tiny_language_model()


def test_questions_of_a_model_have_the_length_of_its_tokens(model):
    names = ["single-key", "common-words", "pass-key"]
    for question in make_questions(model, names, 4000, 2, seed=3):
        encoded = encode(question, model)
        tokens = sum(map(len, (encoded.document, encoded.question, encoded.answer)))
        assert 0.9 * 4000 < tokens <= 4000
        if question.task in RULER:
            assert tokens > 0.95 * 4000


class Scripted(torch.nn.Module):
    """Model that says given tokens, whatever it reads."""

    def __init__(self, model, said):
        super().__init__()
        self.config, self.generation_config = model.config, None
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.said, self.calls = iter(said), 0

    def forward(self, tokens, cache=None, past_key_values=None):
        self.calls += 1
        logits = torch.zeros(1, tokens.shape[1], 256)
        logits[0, -1, next(self.said)] = 1
        return type("Output", (), {"logits": logits})


def scripted(model, said):
    ids = model.encode(said).tolist()
    return replace(model, model=Scripted(model.model, [*ids, *[0] * 400]))


def test_an_answer_ends_when_it_holds_all_that_is_wanted(model):
    cache = prefill(model.model, torch.arange(30))
    encoded = Encoded(torch.arange(30), torch.arange(3), torch.arange(12))
    talker = scripted(model, " Balo, 123 and more")
    assert answer_densely(talker, cache, encoded, ["123", "BALO"]) == " Balo, 123"
    talker = scripted(model, "x" * 300)
    assert answer_densely(talker, cache, encoded, ["y"]) == "x" * (2 * 12 + 16)
    talker = scripted(model, "so.\n")
    talker.model.config.eos_token_id = model.encode(".").item()
    try:
        assert answer_densely(talker, cache, encoded, ["y"]) == "so"
    finally:
        talker.model.config.eos_token_id = 2


def test_the_share_found_ignores_case_and_order():
    assert found_share("the two: BETA, alpha.", ["alpha", "beta", "gamma"]) == pytest.approx(2 / 3)
    assert found_share("", ["x"]) == 0


@pytest.mark.usefixtures("uncompiled_graphs", "seeded")
def test_a_sparse_answer_that_reads_everything_is_the_dense_one(model):
    from lychee_compile.evaluate.models import compiled

    (variant,) = parse_variants("streaming")
    options = variant.backend_options(4000, tokenizer=model.boundaries)
    forward, config = compiled(model.model, options), options.index_config()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(256, (300,), generator=generator)
    encoded = Encoded(ids[:290], ids[290:296], ids[296:])
    cache = prefill(model.model, encoded.document)
    dense = answer_densely(model, cache, encoded, ["@@@"])
    assert answer_sparsely(forward, model, cache, encoded, config, ["@@@"]) == dense
    assert answer_densely(model, cache, encoded, ["@@@"]) == dense
    assert dense


@pytest.mark.thorough
@pytest.mark.usefixtures("uncompiled_graphs", "seeded")
def test_ruler_runs_by_every_way(model):
    names = ["multi-value", "frequent-words"]
    result = run_tasks(model, names, parse_variants("streaming"), [4096], length=3000, repeats=1)
    assert len(result.answers) == 4
    for dense, sparse in (result.answers[:2], result.answers[2:]):
        assert 0 <= dense.found <= 1
        assert (sparse.found, sparse.predicted) == (dense.found, dense.predicted)
        assert sparse.agreement == 1.0
