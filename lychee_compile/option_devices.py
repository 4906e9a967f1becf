"""Table of the options that have an effect on a CPU, and of those that have one on a GPU."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from typing import Literal

from lychee_compile.kernels.config import DRAWN_FROM
from lychee_compile.kernels.policies.registry import estimates_shares, reads_chunks
from lychee_compile.options import Options

OptionDevice = Literal["cpu", "cuda"]
"""Kind of device: "cpu", where PyTorch operators choose and attend, or "cuda", where generated
kernels do. With `reference=True` a GPU runs the PyTorch operators, and so uses the options of a
CPU."""

_EVERYWHERE: tuple[OptionDevice, ...] = ("cpu", "cuda")
_CPU: tuple[OptionDevice, ...] = ("cpu",)
_GPU: tuple[OptionDevice, ...] = ("cuda",)

OPTION_DEVICES: Mapping[str, tuple[OptionDevice, ...]] = {
    "budget": _EVERYWHERE,
    "sinks": _EVERYWHERE,
    "recent": _EVERYWHERE,
    "chunk": _CPU,
    "cluster_chunks": _CPU,
    "coarse_units": _CPU,
    "overfetch": _EVERYWHERE,
    "flat_tokens": _EVERYWHERE,
    "coverage": _EVERYWHERE,
    "boundaries": _CPU,
    "draw": _EVERYWHERE,
    "policy": _EVERYWHERE,
    "epsilon": _EVERYWHERE,  # kernels do not widen a budget: they read all keys instead
    "seed": _CPU,
    "repair": _CPU,
    "dense_layers": _EVERYWHERE,
    "prefill": _EVERYWHERE,
    "prefill_budget": _EVERYWHERE,
    "prefill_coverage": _EVERYWHERE,
    "prefill_from": _EVERYWHERE,
    "reference": _GPU,  # a CPU always runs the PyTorch operators
    "tokenizer": _CPU,
    "mode": _EVERYWHERE,
    "strict": _EVERYWHERE,
    "inductor": _EVERYWHERE,
}
"""Devices on which each option of `Options` has an effect, by the name of the option.

Policies that are declared with chunks use the options of chunks on every device. On a GPU "lychee"
uses them in caches of millions of slots alone, see `pays_to_narrow` in `kernels/gpu/lychee`.
"""

_OF_CHUNKS = frozenset({"chunk", "cluster_chunks", "coarse_units", "boundaries", "seed"})

_IN_WORDS: Mapping[OptionDevice, str] = {"cpu": "a CPU", "cuda": "a GPU"}


def without_effect(options: Options, devices: Collection[OptionDevice]) -> Iterator[str]:
    """Yield a note on the options that were set in vain, given the devices that attention runs on.

    An option counts if it differs from its default and has an effect on none of the devices.
    """
    if options.coverage is not None and not estimates_shares(options.policy):
        yield f"option coverage has no effect with policy={options.policy!r}, which ranks nothing"
    if options.prefill_coverage is not None and options.policy != "lychee":
        yield (
            f"option prefill_coverage has no effect with policy={options.policy!r}, which draws no "
            "keys"
        )
    elif options.prefill_coverage is not None and 1 <= options.prefill_budget < DRAWN_FROM:
        yield (
            f"option prefill_coverage has no effect with prefill_budget={options.prefill_budget}: "
            f"keys are drawn from a budget of {DRAWN_FROM} on"
        )
    if options.draw and options.budget is None:
        yield "option draw has no effect with budget=None, which reads all tokens"
    used = _OF_CHUNKS if reads_chunks(options.policy) else frozenset()
    names = [
        each.name
        for each in fields(Options)
        if each.name not in used
        and not set(OPTION_DEVICES[each.name]) & set(devices)
        and getattr(options, each.name) != each.default
    ]
    if not names or not devices:
        return
    listed = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    noun = "options {} have" if len(names) > 1 else "option {} has"
    where = " or ".join(_IN_WORDS[device] for device in sorted(devices))
    narrows = options.policy == "lychee" and not _OF_CHUNKS.isdisjoint(names)
    sizes = ", unless a cache has millions of slots" if narrows else ""
    yield f"{noun.format(listed)} no effect on {where}{sizes}"
