"""Tensors captured through the backend are those of dense attention."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

pytest.importorskip("transformers")

from evaluated import HEAD_DIM, KV_HEADS, LAYERS, QUERY_HEADS, byte_tokenizer, tiny_llama
from synthetic_capture import synthetic_capture

from lychee_compile import boundary_table
from lychee_compile.__main__ import main
from lychee_compile.evaluate.cache_argument import cache_argument
from lychee_compile.evaluate.capture import Capture, capture, last_positions
from lychee_compile.evaluate.errors import EvaluationError, require

pytestmark = pytest.mark.usefixtures("uncompiled_graphs", "seeded")


def dense_attention_outputs(model, ids):
    """Return the outputs of each layer's attention in one dense pass: [L, Hq, D] each."""
    seen = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
        for layer in model.model.layers
    ]
    model(ids[None])
    for hook in hooks:
        hook.remove()
    return [each.unflatten(-1, (QUERY_HEADS, HEAD_DIM)) for each in seen]


@pytest.mark.parametrize(
    "positions",
    [pytest.param(last_positions(90, 4), marks=pytest.mark.thorough), [5, 6, 40, 41, 89]],
)
def test_captured_tensors_give_what_dense_attention_gives(positions):
    model = tiny_llama()
    ids = torch.randint(256, (90,))
    taken = capture(model, ids, positions, name="tiny", text="noise")
    assert [site.name for site in taken.sites] == [
        f"model.layers.{layer}.self_attn" for layer in range(LAYERS)
    ]
    assert taken.positions.tolist() == positions
    assert taken.lengths.tolist() == [position + 1 for position in positions]
    for site, expected in zip(taken.sites, dense_attention_outputs(model, ids), strict=True):
        assert site.query.shape == (1, QUERY_HEADS, len(positions), HEAD_DIM)
        assert site.key.shape == site.value.shape == (1, KV_HEADS, 90, HEAD_DIM)
        assert site.query.dtype == torch.float32
        for step, position in enumerate(positions):
            key, value = (each[:, :, : position + 1] for each in (site.key, site.value))
            query = site.query[:, :, step : step + 1]
            output = F.scaled_dot_product_attention(
                query, key, value, scale=site.scale, enable_gqa=True
            )
            torch.testing.assert_close(output[0, :, 0], expected[position], rtol=1e-4, atol=1e-5)


def test_sites_can_be_picked_by_pattern():
    taken = capture(tiny_llama(), torch.randint(256, (40,)), [38, 39], sites=["*.layers.1.*"])
    assert [site.name for site in taken.sites] == ["model.layers.1.self_attn"]


def test_a_pattern_that_fits_nothing_is_refused():
    with pytest.raises(
        EvaluationError, match="no global attention was captured among those named nix"
    ):
        capture(tiny_llama(), torch.randint(256, (40,)), [39], sites=["nix"])


@pytest.mark.parametrize("positions", [[], [0, 5], [7, 7], [9, 8], [39, 40]])
def test_positions_must_fit_the_sequence(positions):
    with pytest.raises(EvaluationError, match=r"positions must ascend within \[2, 40\)"):
        capture(tiny_llama(), torch.randint(256, (40,)), positions)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_capture_comes_back_from_its_file(tmp_path, softcap):
    table = boundary_table(byte_tokenizer())
    made = synthetic_capture(50, 3, sites=2, softcap=softcap)
    made = replace(made, strengths=table.lookup(made.token_ids), model="tiny", text="noise")
    made.save(tmp_path / "deep" / "capture.safetensors")
    found = Capture.load(tmp_path / "deep" / "capture.safetensors")
    assert (found.model, found.text, len(found.sites)) == ("tiny", "noise", 2)
    for name in ("positions", "token_ids", "strengths"):
        assert torch.equal(getattr(found, name), getattr(made, name))
    for ours, theirs in zip(found.sites, made.sites, strict=True):
        assert (ours.name, ours.scale, ours.softcap) == (theirs.name, theirs.scale, theirs.softcap)
        for name in ("query", "key", "value"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_other_files_are_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(EvaluationError, match="is no capture"):
        Capture.load(tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("no tensors")
    for name in ("text", "missing"):
        with pytest.raises(EvaluationError, match="cannot read the capture"):
            Capture.load(tmp_path / name)


def test_a_missing_package_names_the_extra():
    with pytest.raises(EvaluationError, match=r"needs nosuchpackage.*lychee_compile\[evaluate\]"):
        require("nosuchpackage", "this")


@pytest.mark.parametrize("package", ["transformers", "matplotlib"])
def test_the_command_names_the_extra(package, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["evaluate", "fidelity", "--model", "any", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"needs {package}, not installed here: pip install 'lychee_compile[evaluate]'" in line


def test_a_cache_is_passed_by_the_name_that_a_model_knows():
    class Newer:
        def forward(self, input_ids, cache=None):
            """Stand for newer models of transformers."""

    class Older:
        def forward(self, input_ids, past_key_values=None):
            """Stand for older models of transformers."""

    class Wrapping:
        def forward(self, *arguments, **more):
            """Stand for models that wrap others."""

    names = [cache_argument(model()) for model in (Newer, Older, Wrapping)]
    assert names == ["cache", "past_key_values", "past_key_values"]
    model = tiny_llama()
    assert cache_argument(model) in inspect.signature(type(model).forward).parameters


def test_importing_the_package_loads_no_evaluation():
    code = "import sys, lychee_compile; print([n for n in sys.modules if 'evaluate' in n])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
