"""An encoder stays exact: the same bits for PyTorch's attention, one kernel for one by hand.

    python examples/bert_encoder.py
    python examples/bert_encoder.py --model DIR
    python examples/bert_encoder.py --sparse --context 8192

Two sentences, the second padded, go through BERT (random, or one that transformers saved): as
transformers runs it by default, and with attention written out ("eager"). With `--sparse` only the
default is run, and every tile of 128 tokens reads the tokens that matter to it, a fifth of all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, BertConfig, BertModel, PreTrainedModel, logging

import lychee_compile
from lychee_compile.report.report import Report


@dataclass
class Compared:
    """Output of the compiled model beside that of the model as it is."""

    error: float
    """Largest difference of the outputs."""
    relative_error: float
    """Norm of the difference over the norm of the uncompiled model's output."""
    same_bits: bool
    """True if the output equals that of another backend, or of the uncompiled model, to the bit."""
    report: Report


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add, device = parser.add_argument, "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="cpu or cuda (%(default)s)")
    share = "128 queries read this share of the keys, 0.2 if none is given (default: all keys)"
    add("--sparse", type=float, nargs="?", const=0.2, metavar="SHARE", help=share)
    short = "with --sparse, fewer keys are all read (%(default)s)"
    add("--from", type=int, default=1024, dest="prefill_from", metavar="N", help=short)
    add("--context", type=int, default=512, metavar="N", help="tokens (%(default)s)")
    add("--model", type=Path, metavar="DIR", help="an encoder that transformers saved")
    add("--against", default="inductor", metavar="BACKEND", help="backend with the same bits")
    return parser.parse_args(arguments)


def load(folder: Path | None, context: int, form: str) -> PreTrainedModel:
    """Return the model in `folder`, or a small random BERT for texts of `context` tokens."""
    if folder is not None:
        return AutoModel.from_pretrained(folder, attn_implementation=form)
    config = BertConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=context, vocab_size=1000, attn_implementation=form,
    )  # fmt: skip
    torch.manual_seed(0)
    return BertModel(config, add_pooling_layer=False)


def compare(
    model: PreTrainedModel, inputs: dict[str, Tensor], against: str | None, options: dict[str, Any]
) -> Compared:
    """Compare lychee's output with that of the model as it is; bits with the backend `against`."""
    output = torch.compile(model, backend="lychee", options=options)(**inputs).last_hidden_state
    report = lychee_compile.reports()[-1]
    expected = other = model(**inputs).last_hidden_state
    if against is not None:
        other = torch.compile(model, backend=against)(**inputs).last_hidden_state
    difference = output - expected
    relative = (difference.norm() / expected.norm()).item()
    return Compared(difference.abs().max().item(), relative, torch.equal(output, other), report)


@torch.no_grad()
def main(arguments: Sequence[str] = ()) -> dict[str, Compared]:
    """Encode with each form of attention, and compare."""
    chosen = parse(arguments)
    logging.set_verbosity_error()
    ids = torch.randint(1000, (2, chosen.context), device=chosen.device)
    mask = torch.ones_like(ids)
    mask[1, chosen.context * 2 // 3 :] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    forms, against, options = ("sdpa", "eager"), chosen.against, {}
    if chosen.sparse is not None:
        forms, against = ("sdpa",), None
        options = {"prefill": "sparse", "prefill_budget": chosen.sparse}
        options["prefill_from"] = chosen.prefill_from

    results = {}
    for form in forms:
        model = load(chosen.model, chosen.context, form).eval().to(chosen.device)
        results[form] = compare(model, inputs, against, options)
    for form, result in results.items():
        print(result.report)
        print(f"{form}: largest difference {result.error:.1e}", end="")
        print(f", relative error {result.relative_error:.1e}")
        if against is not None:
            same = "the same bits as" if result.same_bits else "other bits than"
            print(f"{form}: {same} {against}")
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
