"""An encoder stays exact: the same bits where it calls PyTorch's attention, one kernel where not.

    python examples/bert_encoder.py
    python examples/bert_encoder.py --model DIR
    python examples/bert_encoder.py --sparse --context 8192

Two sentences, the second padded, through BERT (random, or one that transformers saved) as
transformers runs it by default, and with attention written out ("eager"). With `--sparse` the first
of them, in which every tile of 128 tokens reads those that matter to it, a fifth of all.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from showing import (
    Compared,
    backend_options,
    compared,
    console,
    show_reports,
    whole_sequence_options,
)
from torch import Tensor
from transformers import AutoModel, BertConfig, BertModel, PreTrainedModel, logging

import lychee_compile


def load(folder: Path | None, context: int, form: str) -> PreTrainedModel:
    """A model of yours, or a small random BERT for texts of `context` tokens."""
    if folder is not None:
        return AutoModel.from_pretrained(folder, attn_implementation=form)
    config = BertConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=context, vocab_size=1000, attn_implementation=form,
    )  # fmt: skip
    torch.manual_seed(0)
    return BertModel(config, add_pooling_layer=False)


def compare(
    model: PreTrainedModel, inputs: dict[str, Tensor], against: str | None, chosen: dict[str, Any]
) -> Compared:
    """Lychee's output beside that of the model as it is and of another backend."""
    got = torch.compile(model, backend="lychee", options=chosen)(**inputs).last_hidden_state
    report = lychee_compile.reports()[-1]
    plain = model(**inputs).last_hidden_state
    if against is None:
        return compared(got, plain, report)
    other = torch.compile(model, backend=against)(**inputs).last_hidden_state
    return compared(got, plain, report, other)


@torch.no_grad()
def main(arguments: Sequence[str] = ()) -> dict[str, Compared]:
    """Encode with each form of attention, and compare."""
    parser = whole_sequence_options(__doc__)
    add = parser.add_argument
    add("--context", type=int, default=512, metavar="N", help="tokens (default: %(default)s)")
    add("--model", type=Path, metavar="DIR", help="an encoder that transformers saved")
    add("--against", default="inductor", metavar="BACKEND", help="whose bits must be the same")
    given = parser.parse_args(arguments)
    logging.set_verbosity_error()

    ids = torch.randint(1000, (2, given.context), device=given.device)
    mask = torch.ones_like(ids)
    mask[1, given.context * 2 // 3 :] = 0
    against = given.against if given.sparse is None else None
    results = {}
    for form in ("sdpa", "eager") if given.sparse is None else ("sdpa",):
        model = load(given.model, given.context, form).eval().to(given.device)
        inputs = {"input_ids": ids, "attention_mask": mask}
        results[form] = compare(model, inputs, against, backend_options(given))

    screen = console()
    show_reports(screen, [each.report for each in results.values()])
    show_differences(screen, results, against)
    return results


def show_differences(screen: Console, results: dict[str, Compared], against: str | None) -> None:
    """How far the outputs are from those of the models as they are."""
    table = Table("attention", "difference", "relative error", box=SIMPLE_HEAD)
    if against is not None:
        table.add_column(f"same bits as {against}")
    for form, each in results.items():
        bits = [] if against is None else ["yes" if each.same_bits else "no"]
        table.add_row(form, f"{each.error:.1e}", f"{each.relative_error:.1e}", *bits)
    screen.print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
