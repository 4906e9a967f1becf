"""`prepare` and `restore`: what they leave on a model, in copies, in files, and wrong options."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from generating import EVERYTHING, decoder, generate, tokens
from torch import nn

import lychee_compile
from lychee_compile.options import OptionError

pytestmark = pytest.mark.usefixtures("without_inductor", "seeded")


def state(model: Any) -> dict[str, Any]:
    """Return the attributes that the instance has of its own."""
    return dict(vars(model))


def test_restore_leaves_nothing_behind() -> None:
    model = decoder()
    before, config = state(model), copy.deepcopy(model.generation_config.to_dict())
    prepared = lychee_compile.prepare(model, **EVERYTHING)
    assert prepared.model is model
    generate(model, None, tokens(1, 20), max_new_tokens=3)
    assert set(state(model)) - set(before) == {"generate", "__getstate__"}
    lychee_compile.restore(model)
    assert state(model) == before
    assert model.generation_config.to_dict() == config
    assert "generate" not in vars(type(model))
    lychee_compile.restore(model)  # a plain model stays as it is


def test_the_class_and_other_instances_are_untouched() -> None:
    model, other = decoder(), decoder()
    before = dict(vars(type(model)))
    lychee_compile.prepare(model, **EVERYTHING)
    assert dict(vars(type(model))) == before
    assert "generate" not in vars(other)


def test_a_generate_of_the_instance_comes_back() -> None:
    model = decoder()
    model.generate = own = lambda: None
    with lychee_compile.prepare(model, **EVERYTHING):
        assert model.generate is not own
        assert copy.copy(model).generate is own
    assert model.generate is own


def test_an_error_within_generate_leaves_the_model_plain() -> None:
    model = decoder()
    before = state(model)
    with lychee_compile.prepare(model, **EVERYTHING), pytest.raises(ValueError, match="not_known"):
        generate(model, None, tokens(1, 20), not_known=torch.ones(1))
    assert state(model) == before


def test_preparing_again_takes_the_new_options() -> None:
    model = decoder()
    first = lychee_compile.prepare(model, budget=100)
    second = lychee_compile.prepare(model, budget=200)
    first.restore()  # it is replaced, and has nothing to give back
    assert "generate" in vars(model)
    second.restore()
    assert "generate" not in vars(model)


def saved_and_loaded(model: Any) -> Any:
    """Return a model from a file that `torch.save` has written."""
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def test_copies_are_plain_models() -> None:
    """Also those of a model that has generated, and so has compiled code."""
    model = decoder()
    plain = set(state(model))
    lychee_compile.prepare(model, **EVERYTHING)
    generate(model, None, tokens(1, 20), max_new_tokens=3)
    pickled = pickle.loads(pickle.dumps(model))
    for other in (pickled, copy.copy(model), copy.deepcopy(model), saved_and_loaded(model)):
        assert type(other) is type(model)
        assert set(state(other)) == plain
        assert other.generate.__func__ is type(model).generate
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, other.state_dict()[name])
        assert "generate" in vars(model)


def test_what_is_saved_is_the_plain_model(tmp_path: Path) -> None:
    model = decoder()
    model.save_pretrained(tmp_path / "plain")
    lychee_compile.prepare(model, **EVERYTHING)
    model.save_pretrained(tmp_path / "prepared")
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "prepared").iterdir())
    for name in names:
        one, other = (tmp_path / folder / name for folder in ("plain", "prepared"))
        assert one.read_bytes() == other.read_bytes()


def test_a_prepared_model_is_not_kept_alive() -> None:
    model = decoder()
    lychee_compile.prepare(model, **EVERYTHING)
    gc.disable()
    try:
        reference = weakref.ref(model)
        del model
        assert reference() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"cache": "statik"},
            "option cache='statik'.*'growing' or 'static' or 'dynamic'.*'static'",
        ),
        ({"prefill": "fast"}, "option prefill='fast'.*'dense' or 'exact' or 'sparse'"),
        ({"prefill_chunk": 4}, "option prefill_chunk=4.*at least 17.*or None"),
        ({"prefill_chunk": "all"}, "option prefill_chunk='all'"),
        ({"prefil_chunk": 4}, "unknown option 'prefil_chunk'.*'prefill_chunk'.*known are cache"),
        ({"budgett": 4}, "unknown option 'budgett'.*'budget'"),
        ({"budget": 0}, "option budget=0"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], words: str) -> None:
    model = decoder()
    with pytest.raises(OptionError, match=words):
        lychee_compile.prepare(model, **options)
    assert "generate" not in vars(model)


def test_other_models_are_refused_in_words() -> None:
    with pytest.raises(TypeError, match=r"Linear has none: use torch.compile\(model, backend="):
        lychee_compile.prepare(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"not its name 'gpt2': load it by AutoModelForCausalLM"):
        lychee_compile.prepare("gpt2")


def test_importing_the_package_imports_no_transformers() -> None:
    code = "import sys, lychee_compile; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
