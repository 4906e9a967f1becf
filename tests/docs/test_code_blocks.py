"""The code blocks of the README run as they stand."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

import lychee_compile
from tools.links import ROOT

transformers = pytest.importorskip("transformers")


@pytest.mark.filterwarnings("ignore:.*script_method")
def test_the_first_code_block_reads_a_cache_sparsely(capsys, without_inductor):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    sizes |= {"num_hidden_layers": 1, "num_key_value_heads": 2, "vocab_size": 100}
    config = transformers.LlamaConfig(**sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    cache = transformers.StaticCache(config=config, max_cache_len=2048)
    given = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with torch.no_grad():
        model(torch.randint(100, (1, 1500)), **{given: cache})
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    block = next(each for each in re.findall(r"(?ms)^```python\n(.*?)^```", page) if "ids" in each)
    source = block.replace("cache=cache", f"{given}=cache")
    exec(source, {"model": model, "ids": torch.randint(100, (1, 1)), "cache": cache})
    assert all(site.decision == "sparse" for site in lychee_compile.reports()[-1].sites)
    assert capsys.readouterr().out.count("1 sparse") == 2
