"""The code blocks of the README and of the first ten minutes run as they stand."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

import lychee_compile
from lychee_compile.kernels.policies import registry
from tools.links import ROOT

transformers = pytest.importorskip("transformers")

CACHE = (
    "cache"
    if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters
    else "past_key_values"
)
"""Name of the argument for the cache: another one before transformers 5.24."""


@pytest.mark.filterwarnings("ignore:.*script_method")
def test_the_first_code_block_reads_a_cache_sparsely(capsys, without_inductor):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    sizes |= {"num_hidden_layers": 1, "num_key_value_heads": 2, "vocab_size": 100}
    config = transformers.LlamaConfig(**sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    cache = transformers.StaticCache(config=config, max_cache_len=2048)
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    block = next(
        each for each in re.findall(r"(?ms)^```python\n(.*?)^```", page) if "token" in each
    )
    source = block.replace("cache=cache", f"{CACHE}=cache")
    names = {"prompt": torch.randint(100, (1, 1500)), "token": torch.randint(100, (1, 1))}
    exec(source, {"model": model, "cache": cache, **names})
    assert all(site.decision == "sparse" for site in lychee_compile.reports()[-1].sites)
    assert capsys.readouterr().out.count("1 sparse") == 2


def shortened(block: str) -> str:
    """Return a block with fewer tokens of prompt and of answer, for the transformers at hand."""
    for long, short in (("4000", "1300"), ('"max_new_tokens": 16', '"max_new_tokens": 3')):
        block = block.replace(long, short)
    return block.replace("cache=cache", f"{CACHE}=cache")


TOUR = (ROOT / "docs" / "first-ten-minutes.md").read_text(encoding="utf-8")


def words(text: str) -> set[str]:
    """Return the words of an output, with 0 for each number and without rules of tables."""
    return set(re.sub(r"[\d,.]*\d", "0", text.replace("\u2500", "")).split())


@pytest.mark.filterwarnings("ignore:.*script_method")
@pytest.mark.usefixtures("uncompiled_graphs", "seeded")
@pytest.mark.parametrize(
    "left_out", [("Call the model", "Try other"), pytest.param((), marks=pytest.mark.thorough)]
)
def test_the_first_ten_minutes_print_what_the_page_says(left_out, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "_policies", dict(registry._policies))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    sections = [each for each in TOUR.split("\n## ")[1:] if not each.startswith(left_out or "\n")]
    for kind, block in re.findall(r"(?ms)^```(python|text)\n(.*?)^```", "\n".join(sections)):
        if kind == "python":
            exec(shortened(block), names)
        else:
            assert words(capsys.readouterr().out) == words(block)
    assert (tmp_path / "tiny" / "config.json").exists()
