"""`explain`: a model is explained by its configuration, and as one with weights would be."""

from __future__ import annotations

import json
import shlex

import pytest
import torch

pytest.importorskip("transformers")

from saved_configurations import save_gemma, save_gpt_oss, save_llama
from transformers import AutoConfig, AutoModelForCausalLM

from lychee_compile import explain
from lychee_compile.__main__ import main
from lychee_compile.cli.bench.filled_cache import filled_cache
from lychee_compile.cli.configurations import new_model
from lychee_compile.cli.explain.depth import find_depth, shallow_configuration, signatures
from lychee_compile.cli.explain.index_costs import CacheShape, IndexCosts
from lychee_compile.evaluate.cache_argument import cache_argument
from lychee_compile.kernels.gpu.methods import gpu_method
from lychee_compile.options import Options

CPU = torch.device("cpu")


def explained(folder, arguments, capsys):
    status = main(["explain", str(folder), "--device", "cpu", "--json", *shlex.split(arguments)])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    return json.loads(printed.out)


def kinds(context):
    return {kind["attentions"]: kind for kind in context["attentions"]}


def test_a_deep_model_is_explained_by_its_kinds_of_layers(tmp_path, capsys):
    content = explained(save_gemma(tmp_path), "--context 2k --budget 90 --batch 2", capsys)
    assert (content["layers"], content["layers_traced"]) == (7, 3)
    (long,) = content["contexts"]
    found = kinds(long)
    sliding = found["model.layers.{0-1,3-4,6}.self_attn"]
    full = found["model.layers.{2,5}.self_attn"]
    assert (sliding["count"], sliding["decision"]) == (5, "kept")
    assert sliding["keys"] == sliding["keys_read"] == 5 * 64
    assert (full["count"], full["decision"], full["reason"]) == (2, "sparse", None)
    assert (full["keys"], full["keys_read"]) == (2 * 2048, 2 * 90)
    assert full["index_bytes"] > 0
    per_key = 2 * 2 * 2 * (8 + 8)  # rows, KV heads, bytes
    sizes = {"bfloat16": 1, "float32": 2}[content["dtype"]]
    assert long["cache_bytes"] == sizes * per_key * (5 * 64 + 2 * 2048)
    assert long["dense_bytes"] == long["cache_bytes"]
    assert long["share_of_dense_bytes"] < 1
    assert all(kind["decision"] == "sparse" or kind["reason"] for kind in found.values())


@pytest.mark.parametrize(
    "save", [save_gpt_oss, pytest.param(save_llama, marks=pytest.mark.thorough)]
)
@pytest.mark.usefixtures("seeded")
def test_an_explanation_is_that_of_the_model_itself(save, tmp_path, capsys):
    folder = save(tmp_path)
    content = explained(folder, "--context 256 --budget 100 --option dense_layers=1", capsys)
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    cache = filled_cache(model, 1, 255, 256)
    token = torch.zeros(1, 1, dtype=torch.int64)
    report = explain(
        model, token, options={"budget": 100, "dense_layers": 1}, **{cache_argument(model): cache}
    )
    (context,) = content["contexts"]
    assert content["layers_traced"] < content["layers"]
    counts = {"sparse": 0, "exact": 0, "kept": 0}
    for kind in context["attentions"]:
        counts[kind["decision"]] += kind["count"]
    assert counts == {name: report.counts()[name] for name in counts}
    assert counts["sparse"]
    stated = {site.name: (site.decision, site.reads, site.mask) for site in report.sites}
    for kind in context["attentions"]:
        assert (kind["decision"], kind["reads"], kind["mask"]) in stated.values()
        assert kind["count"] == list(stated.values()).count(
            (kind["decision"], kind["reads"], kind["mask"])
        )


def test_the_table_gives_reason_remedy_and_sizes(tmp_path, capsys):
    folder = save_llama(tmp_path, layers=1)
    assert main(["explain", str(folder), "--device", "cpu", "--context", "1k"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in (
        "model.layers.0.self_attn",
        "[within-budget]",
        "or set a smaller budget",
        "65.5 kB",
    ):
        assert part in shown


def built(save, folder):
    config = AutoConfig.from_pretrained(save(folder))
    return config, new_model(config, torch.float32, CPU)


@pytest.mark.parametrize(("save", "dense", "traced"), [(save_gemma, 0, 3), (save_gemma, 3, 6),
                                                       (save_gpt_oss, 0, 2), (save_llama, 2, 3),
                                                       (save_llama, 0, 2)])  # fmt: skip
def test_few_layers_stand_for_all(save, dense, traced, tmp_path):
    config, model = built(save, tmp_path)
    depth = find_depth(model, config, dense)
    assert depth.traced == traced
    assert all(depth.stands_for[layer] == layer for layer in range(traced))
    every = signatures(model.model.layers, config)
    for layer, other in enumerate(depth.stands_for[traced:], traced):
        assert other >= dense
        assert every[layer] == every[other]
    shallow = shallow_configuration(config, traced)
    assert depth.is_start_of(model, config, new_model(shallow, torch.float32, CPU), shallow)


def test_a_layer_that_is_unlike_all_before_is_traced(tmp_path):
    config, model = built(save_llama, tmp_path)
    model.model.layers[4].self_attn.scaling = 0.5
    assert find_depth(model, config, 0) is None
    model.model.layers[3].self_attn.scaling = 0.5
    assert find_depth(model, config, 0).stands_for == (0, 1, 2, 3, 3)
    other = new_model(shallow_configuration(config, 4), torch.float32, CPU)
    depth = find_depth(model, config, 0)
    assert not depth.is_start_of(model, config, other, shallow_configuration(config, 4))


@pytest.mark.parametrize("policy", ["lychee", "quest", "clusterkv", "lycheecluster", "streaming"])
def test_bytes_of_a_gpu_index_are_those_of_its_layout(policy):
    options = Options.parse(None, {"policy": policy})
    shape = CacheShape(2, 4, 5000, 64, torch.bfloat16, CPU)
    key = torch.empty(2, 4, 5000, 64, dtype=torch.bfloat16, device="meta")
    costs = IndexCosts(options, kernels=True)
    assert costs.bytes(shape) == gpu_method(policy).layout_of(key).size
    dense = 2 * key.numel() * 2
    assert 0 <= costs.bytes_per_step(shape, 1024) < dense


@pytest.mark.parametrize("policy", ["lychee", "quest", "tokenselect"])
def test_costs_of_a_cpu_index_grow_with_the_context(policy):
    costs = IndexCosts(Options.parse(None, {"policy": policy}), kernels=False)
    short, long = (CacheShape(1, 1, length, 16, torch.float32, CPU) for length in (8192, 65536))
    assert 0 < costs.bytes(short) < costs.bytes(long) < 9 * costs.bytes(short)
    assert 0 < costs.build_seconds(short) < costs.build_seconds(long)
    assert costs.bytes_per_step(short, 1024) <= costs.bytes_per_step(long, 1024)


def test_long_contexts_of_a_gpu_read_pages_first():
    costs = IndexCosts(Options.parse(None, {}), kernels=True)
    flat, paged = (
        costs.bytes_per_step(CacheShape(1, 8, length, 128, torch.bfloat16, CPU), 1024)
        for length in (65536, 131072)
    )
    assert paged < flat
