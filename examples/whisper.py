"""Whisper: an exact encoder, and a decoder that reads few of its 1,500 frames at each token.

    python examples/whisper.py
    python examples/whisper.py --model DIR

Keys over the sound are computed once and read at every token, so that cross-attention is sparse.
The text is shorter than the budget, so that self-attention stays. The model is small and random, or
one that transformers saved; the sound is noise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
    logging,
)

import lychee_compile
from lychee_compile.recorder import Recorder
from lychee_compile.report.report import Report


@dataclass
class Generated:
    """Tokens of both runs, int64 [B, tokens], and what the sparse one read."""

    dense: Tensor
    sparse: Tensor
    recorder: Recorder
    reports: list[Report]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add, device = parser.add_argument, "cuda" if torch.cuda.is_available() else "cpu"
    add("--model", type=Path, metavar="DIR", help="a Whisper that transformers saved")
    add("--device", default=device, help="cpu or cuda (%(default)s)")
    add("--context", type=int, default=1500, metavar="N", help="frames of sound (%(default)s)")
    add("--new-tokens", type=int, default=16, metavar="N", help="tokens to generate (%(default)s)")
    add("--budget", type=int, default=256, metavar="N", help="tokens read per step (%(default)s)")
    add("--reference", action="store_true", help="on a GPU, run the plain operators, not kernels")
    return parser.parse_args(arguments)


def random_whisper(frames: int) -> PreTrainedModel:
    """Return two layers each of encoder and decoder, for `frames` hundredths of two seconds."""
    config = WhisperConfig(
        d_model=128, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=256, decoder_ffn_dim=256, vocab_size=1000,
        max_source_positions=frames, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config)
    for layer in model.model.decoder.layers:  # random queries attend to all alike, trained ones not
        layer.encoder_attn.q_proj.weight *= 80
    return model


@torch.no_grad()
def main(arguments: Sequence[str] = ()) -> Generated:
    """Transcribe noise densely and sparsely, and show what was read."""
    chosen = parse(arguments)
    logging.set_verbosity_error()
    if chosen.model is None:
        model = random_whisper(chosen.context)
    else:
        model = WhisperForConditionalGeneration.from_pretrained(chosen.model)
    model = model.eval().to(chosen.device)
    frames = 2 * model.config.max_source_positions  # a convolution halves them
    sound = torch.randn(1, model.config.num_mel_bins, frames, device=chosen.device)
    greedy = {"max_new_tokens": chosen.new_tokens, "do_sample": False, "eos_token_id": None}

    dense = model.generate(sound, **greedy)

    # CUDA graphs, the default on a GPU, would hide from the recorder what is read.
    options = {"budget": chosen.budget, "reference": chosen.reference, "mode": "default"}
    lychee_compile.prepare(model, **options)
    with lychee_compile.record(mass=True) as recorder:  # only to see what is read
        sparse = model.generate(sound, **greedy)

    print("The encoder:", lychee_compile.explain(model.model.encoder, sound))
    print("\nThe decoder:", end=" ")
    result = Generated(dense, sparse, recorder, lychee_compile.reports())
    show(result)
    return result


def show(result: Generated) -> None:
    """Print the reports, the tokens, and what each attention read, mean over steps and heads."""
    print(*dict.fromkeys(map(str, result.reports)), sep="\n\n")
    print("\ndense: ", *result.dense[0].tolist())
    print("lychee:", *result.sparse[0].tolist())
    agreeing = (result.dense == result.sparse).long().cumprod(1).sum(1).min()
    print(f"The first {agreeing} of {result.dense.shape[1]} tokens are the same.")
    print(result.recorder)


if __name__ == "__main__":
    main(sys.argv[1:])
