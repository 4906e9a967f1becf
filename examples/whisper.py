"""Whisper: an exact encoder, and a decoder that reads few of its 1,500 frames at each token.

    python examples/whisper.py
    python examples/whisper.py --model DIR

Keys over the sound are computed once and read at every token, so cross-attention is sparse; the
text is shorter than the budget, so self-attention stays. The model is small and random, or one
that transformers saved; the sound is noise.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from showing import Decoded, console, decoder_options, show_decoded, show_reports
from transformers import (
    CompileConfig,
    PreTrainedModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
    logging,
)

import lychee_compile


def random_whisper(frames: int) -> PreTrainedModel:
    """Two layers each of encoder and decoder, for sounds of `frames` hundredths of two seconds."""
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
def main(arguments: Sequence[str] = ()) -> Decoded:
    """Transcribe noise twice; the tokens of both, and what was read."""
    parser = decoder_options(__doc__, context=1500, budget=256)
    parser.add_argument("--model", type=Path, metavar="DIR", help="a Whisper that was saved")
    given = parser.parse_args(arguments)
    logging.set_verbosity_error()
    if given.model is None:
        model = random_whisper(given.context)
    else:
        model = WhisperForConditionalGeneration.from_pretrained(given.model)
    model = model.eval().to(given.device)
    frames = 2 * model.config.max_source_positions  # a convolution halves them
    sound = torch.randn(1, model.config.num_mel_bins, frames, device=given.device)
    greedy = {"max_new_tokens": given.new_tokens, "do_sample": False, "eos_token_id": None}

    dense = model.generate(sound, **greedy)

    options = {"budget": given.budget, "reference": given.reference}
    config = CompileConfig(backend="lychee", mode=None, options=options)
    config._compile_all_devices = True  # generate() compiles on accelerators alone, unless asked
    with lychee_compile.record(mass=True) as recorder:  # only to see what is read
        sparse = model.generate(
            sound, **greedy, cache_implementation="static", compile_config=config
        )

    screen = console()
    show_reports(screen, [lychee_compile.explain(model.model.encoder, sound)])
    decoded = Decoded(dense, sparse, recorder.calls, lychee_compile.reports())
    show_decoded(screen, decoded)
    return decoded


if __name__ == "__main__":
    main(sys.argv[1:])
