"""An encoder stays exact: the same bits where it calls PyTorch's attention, one kernel where not.

    python examples/bert_encoder.py
    python examples/bert_encoder.py --model DIR

Two sentences, the second padded, through BERT (random, or one that transformers saved) as
transformers runs it by default, and with attention written out ("eager").
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from showing import Compared, console, options, show_reports
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


def compare(model: PreTrainedModel, inputs: dict[str, Tensor], against: str) -> Compared:
    """Lychee's output beside that of the model as it is and of another backend."""
    got = torch.compile(model, backend="lychee")(**inputs).last_hidden_state
    other = torch.compile(model, backend=against)(**inputs).last_hidden_state
    plain = model(**inputs).last_hidden_state
    return Compared(
        error=(got - plain).abs().max().item(),
        same_bits=torch.equal(got, other),
        report=lychee_compile.reports()[-1],
    )


@torch.no_grad()
def main(arguments: Sequence[str] = ()) -> dict[str, Compared]:
    """Encode with each form of attention, and compare."""
    parser = options(__doc__)
    add = parser.add_argument
    add("--context", type=int, default=512, metavar="N", help="tokens (default: %(default)s)")
    add("--model", type=Path, metavar="DIR", help="an encoder that transformers saved")
    add("--against", default="inductor", metavar="BACKEND", help="whose bits must be the same")
    given = parser.parse_args(arguments)
    logging.set_verbosity_error()

    ids = torch.randint(1000, (2, given.context), device=given.device)
    mask = torch.ones_like(ids)
    mask[1, given.context * 2 // 3 :] = 0
    compared = {}
    for form in ("sdpa", "eager"):
        model = load(given.model, given.context, form).eval().to(given.device)
        compared[form] = compare(model, {"input_ids": ids, "attention_mask": mask}, given.against)

    screen = console()
    show_reports(screen, [each.report for each in compared.values()])
    table = Table("attention", "difference", f"same bits as {given.against}", box=SIMPLE_HEAD)
    for form, each in compared.items():
        table.add_row(form, f"{each.error:.1e}", "yes" if each.same_bits else "no")
    screen.print(table)
    return compared


if __name__ == "__main__":
    main(sys.argv[1:])
