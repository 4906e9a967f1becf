"""Questions about documents, and how they are asked: densely and sparsely."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from evaluated import tiny_language_model

from lychee_compile import record
from lychee_compile.evaluate.errors import EvaluationError
from lychee_compile.evaluate.models import compiled, prefill
from lychee_compile.evaluate.reading import Encoded, encode, read_densely, read_sparsely
from lychee_compile.evaluate.task_texts import TASKS, Filler, Question, make_question
from lychee_compile.evaluate.tasks import run_tasks
from lychee_compile.evaluate.texts import BUILT_IN, read_text
from lychee_compile.evaluate.variants import Variant, parse_variants
from lychee_compile.functional import build_index


def characters(texts):
    return [len(text) for text in texts]


def a_question(task, depth=0.5, seed=0, tokens=40_000):
    filler = Filler(TASKS[task][0], characters)
    return make_question(task, filler, tokens, depth, characters, random.Random(seed))


@pytest.mark.parametrize("depth", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("task", TASKS)
def test_a_document_holds_the_answer_once_and_where_it_should(task, depth):
    question = a_question(task, depth)
    answer = question.answer.strip()
    assert question.document.count(answer) == 1
    assert answer not in question.question
    assert question.document.index(answer) / len(question.document) == pytest.approx(depth, abs=0.1)
    assert 30_000 < len(question.document) <= 40_000


@pytest.mark.parametrize("task", TASKS)
def test_questions_are_repeatable_and_differ(task):
    assert a_question(task, seed=1) == a_question(task, seed=1)
    assert a_question(task, seed=1).document != a_question(task, seed=2).document


def test_a_long_paragraph_does_not_end_a_document_early(monkeypatch):
    paragraphs = ["word " * 20] * 30
    paragraphs[::10] = ["long " * 400] * 3
    monkeypatch.setitem(BUILT_IN, "prose", lambda: "\n\n".join(paragraphs))
    filler = Filler("prose", lambda texts: [len(text.split()) for text in texts])
    for seed in range(20):
        taken = filler.take(300, random.Random(seed))
        assert 285 <= sum(len(each.split()) for each in taken) <= 300


def test_what_is_asked_is_what_the_document_says():
    for seed in range(5):
        question = a_question("pass-keys", seed=seed)
        assert question.question.rpartition("Answer: ")[2] + question.answer in question.document
        assert question.document.count("The pass key of the") == 8
        question = a_question("json-lookup", seed=seed)
        assert question.question.rpartition("\n")[2] + question.answer + '"' in question.document
        question = a_question("repeated-copy", seed=seed)
        assert question.question.strip() + question.answer in question.document


@pytest.mark.parametrize("seed", range(6))
def test_functions_and_constants_give_the_answer(seed):
    question = a_question("function-lookup", seed=seed)
    names = {}
    lines = question.document.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if "pass_key():" in line or "_PASS_KEY = " in line:
            exec(f"{line}\n{following if line.startswith('def') else ''}", names)
    expression = question.question.rpartition("assert ")[2].removesuffix(" ==")
    assert eval(expression, names) == int(question.answer)


def test_a_document_too_short_for_its_facts_is_refused():
    with pytest.raises(EvaluationError, match="--length 900: too short for pass-keys"):
        a_question("pass-keys", tokens=900)


@pytest.mark.parametrize("kind", BUILT_IN)
def test_built_in_texts_are_long(kind):
    assert len(read_text(kind)[1]) > 200_000


def test_texts_of_the_user(tmp_path):
    (tmp_path / "text").write_text("这是一个没有空格的句子。", encoding="utf-8")
    assert read_text(f"chinese={tmp_path / 'text'}") == ("chinese", "这是一个没有空格的句子。")
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xfd")
    wrong = {"rust": "expected code, json, prose", f"x={tmp_path / 'no'}": "No such file"}
    wrong |= {f"x={tmp_path / 'empty'}": "nothing in it", f"x={tmp_path / 'bytes'}": "byte 0"}
    for source, message in wrong.items():
        with pytest.raises(EvaluationError, match=message):
            read_text(source)


class Merging:
    """A tokenizer for which "is 1" is one token."""

    def __call__(self, text, add_special_tokens=True):
        words = text.replace("is 1", "§").replace(" ", "")
        self.input_ids = [ord(letter) for letter in words]
        return self


def test_a_token_across_question_and_answer_counts_to_the_answer():
    model = replace(tiny_language_model(), tokenizer=Merging())
    encoded = encode(Question("t", "doc", "key is", " 12", 0.5), model)
    assert encoded.question.tolist() == [ord(letter) for letter in "key"]
    assert encoded.answer.tolist() == [ord("§"), ord("2")]
    assert encoded.decoded.tolist() == [*encoded.question.tolist(), ord("§")]


@pytest.fixture(scope="module")
def model():
    return tiny_language_model()


def read_both_ways(model, variant, budget, document=400):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(256, (document + 12,), generator=generator)
    encoded = Encoded(ids[:document], ids[document:-4], ids[-4:])
    cache = prefill(model.model, encoded.document)
    options = variant.backend_options(budget, tokenizer=model.boundaries)
    forward = compiled(model.model, options)
    before = [layer.keys.clone() for layer in cache.layers]
    dense = read_densely(model, cache, encoded)
    sparse = read_sparsely(forward, model, cache, encoded, options.index_config())
    again = read_sparsely(forward, model, cache, encoded, options.index_config())
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
    torch.testing.assert_close(again.log_probs, sparse.log_probs, rtol=1e-4, atol=1e-4)
    return encoded, dense, sparse


@pytest.mark.usefixtures("uncompiled_graphs", "seeded")
def test_reading_everything_sparsely_is_reading_densely(model):
    everything = Variant("lychee", {"sinks": 200, "recent": 300})
    encoded, dense, sparse = read_both_ways(model, everything, 501, document=490)
    assert torch.equal(sparse.predicted, dense.predicted)
    assert sparse.agreement(dense) == 1.0
    assert sparse.divergence(dense) == pytest.approx(0, abs=1e-6)
    whole = torch.cat((encoded.document, encoded.question, encoded.answer))
    expected = model.model(whole[None]).logits[0].log_softmax(-1)[-5:-1]
    assert torch.equal(dense.predicted, expected.argmax(-1))
    likelihood = expected.gather(-1, encoded.answer[:, None]).sum().item()
    assert dense.log_likelihood == pytest.approx(likelihood, abs=1e-3)
    assert sparse.log_likelihood == pytest.approx(likelihood, abs=1e-3)
    assert not dense.exact
    assert replace(dense, expected=dense.predicted).exact


@pytest.mark.usefixtures("uncompiled_graphs", "seeded")
def test_reading_little_differs_and_reads_within_the_budget(model):
    with record() as recorder:
        _, dense, sparse = read_both_ways(model, Variant("lychee"), 100)
    assert recorder.calls
    assert all(int(call.tokens_read.max()) <= 100 for call in recorder.calls)
    assert sparse.divergence(dense) > 1e-4


@pytest.mark.usefixtures("uncompiled_graphs", "seeded")
def test_the_document_is_cut_at_the_boundaries_of_its_tokens(model):
    with record() as recorder:
        encoded, _, _ = read_both_ways(model, Variant("lychee", {"boundaries": "tokens"}), 100)
    strengths = model.boundaries.lookup(encoded.document)[None]
    keys = prefill(model.model, encoded.document).layers[0].keys
    options = {"boundaries": "tokens", "tokenizer": model.boundaries}
    starts, lengths = build_index(keys, strengths, options=options).partition()
    call = recorder.calls[0]
    settled = (starts + lengths)[0] < 370  # the last tokens are cut when more have come
    chunks = set(zip(starts[0][settled].tolist(), lengths[0][settled].tolist(), strict=True))
    seen = zip(call.chunk_starts[0].tolist(), call.chunk_lengths[0].tolist(), strict=True)
    assert len(chunks) > 20
    assert chunks <= set(seen)


@pytest.mark.thorough
@pytest.mark.usefixtures("uncompiled_graphs", "seeded")
def test_tasks_run_by_every_way(model):
    counted = []
    result = run_tasks(
        model,
        ["pass-key", "repeated-copy"],
        parse_variants("streaming"),
        [100, 4096],
        length=3500,
        repeats=1,
        advance=counted.append,
    )
    assert sum(counted) == 2 * (1 + 2) == len(result.answers)
    for answer in result.answers:
        assert 2000 < answer.document_tokens <= 3500
        assert answer.log_likelihood < 0
        if answer.budget in (None, 4096):
            assert answer.agreement == 1.0
            assert answer.divergence == pytest.approx(0, abs=1e-4)
    rows = {(row.task, row.policy, row.budget): row for row in result.rows()}
    assert len(rows) == 3 * 3
    assert rows["all", "dense", None].questions == 2
    some = rows["pass-key", "streaming", 100].divergence
    assert rows["all", "streaming", 100].divergence > some / 2 > 0


@pytest.mark.thorough
@pytest.mark.usefixtures("uncompiled_graphs", "seeded")
def test_documents_are_read_sparsely_where_a_variant_says_so(model):
    sparse = "lychee:prefill=sparse:prefill_from=64:prefill_budget"
    variants = parse_variants(f"{sparse}=100000,{sparse}=0.05")
    given = {"length": 700, "repeats": 1}
    result = run_tasks(model, ["pass-key"], variants, [2048], **given)
    _, everything, little = result.answers
    assert everything.agreement == 1.0
    assert everything.divergence == pytest.approx(0, abs=1e-4)
    assert little.divergence > 1e-3


def test_wrong_tasks_and_lengths_are_refused(model):
    with pytest.raises(EvaluationError, match="--tasks riddle: expected some of pass-key"):
        run_tasks(model, ["riddle"], [Variant("lychee")], [100], length=1000, repeats=1)
    with pytest.raises(EvaluationError, match=r"--length 9000: expected at least 512 .*4,096"):
        run_tasks(model, ["pass-key"], [Variant("lychee")], [100], length=9000, repeats=1)
