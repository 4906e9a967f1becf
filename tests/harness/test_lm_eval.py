"""lm-evaluation-harness decodes generations and likelihoods through the backend."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("datasets")

import lm_eval
from lm_eval.tasks import TaskManager

import lychee_compile
from examples.long_document.lookup import make_model, make_tokenizer
from lychee_compile.harness import LycheeLM
from lychee_compile.options import OptionError

PLACES = {"old stone castle": "48213", "green water garden": "70355", "north fish harbour": "16482"}
FILLER = "A name refers to an object, and an object may be bound to more names than one. " * 12
TASKS = {
    "lookup_choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{right}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "lookup_generation": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[right]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Tasks of the harness, in YAML, whose data are in a file beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    facts = [f"The pass key of the {place} is {key}. " for place, key in PLACES.items()]
    document = FILLER.join(["", *facts, ""])
    asked = [
        {"text": f"{document}The pass key of the {place} is ", "choices": list(PLACES.values())}
        | {"right": number}
        for number, place in enumerate(PLACES)
    ]
    data = folder / "lookups.json"
    data.write_text("\n".join(json.dumps(each) for each in asked))
    for name, settings in TASKS.items():
        task = {"task": name, "dataset_path": "json", "test_split": "test", **settings}
        task |= {"dataset_kwargs": {"data_files": {"test": str(data)}}, "doc_to_text": "{{text}}"}
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that looks things up, as transformers saves it."""
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    make_tokenizer([FILLER, *PLACES]).save_pretrained(folder)
    return folder


def scores(model, folder, tasks, name, **arguments):
    """The scores and the likelihoods or texts of one task."""
    arguments = {"pretrained": str(folder), "device": "cpu", **arguments}
    results = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=[name], task_manager=tasks, bootstrap_iters=0
    )
    return results["results"][name], [each["resps"] for each in results["samples"][name]]


@pytest.mark.parametrize(
    ("name", "metric"), [("lookup_choice", "acc"), ("lookup_generation", "exact_match")]
)
def test_answers_are_decoded_sparsely(without_inductor, folder, tasks, name, metric):
    with lychee_compile.record() as recorder:
        found, _ = scores("lychee", folder, tasks, name, budget=128, question_tokens=8)
    assert found[f"{metric},none"] == 1
    assert recorder.calls
    assert all(int(call.tokens_read.max()) <= 128 < call.kv_len for call in recorder.calls)


def test_likelihoods_are_those_of_hf_if_the_budget_holds_the_text(without_inductor, folder, tasks):
    _, plain = scores("hf", folder, tasks, "lookup_choice")
    _, prepared = scores("lychee", folder, tasks, "lookup_choice", budget=4096)
    for expected, actual in zip(plain, prepared, strict=True):
        for (left, left_greedy), (right, right_greedy) in zip(
            (each[0] for each in expected), (each[0] for each in actual), strict=True
        ):
            assert right == pytest.approx(left, abs=1e-3)
            assert right_greedy == left_greedy


def test_wrong_arguments_are_refused(folder):
    with pytest.raises(OptionError, match="one row at a time"):
        LycheeLM(str(folder), batch_size=4)
    with pytest.raises(OptionError, match="question_tokens=-1"):
        LycheeLM(str(folder), question_tokens=-1)
