"""Picture of the chunks of a document that each decode step read from."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from examples.long_document.answers import Recording
from examples.long_document.reading import Reading
from lychee_compile import Options

LISTED = 12
"""Number of chunks whose text is shown."""
FACT_COLOUR = "crimson"
NEAR = 400
"""Number of tokens on each side of the planted fact that are drawn once more."""
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei")
MONOSPACE = ("DejaVu Sans Mono", "Noto Sans Mono CJK SC", "WenQuanYi Zen Hei Mono")


@dataclass(frozen=True)
class _Entry:
    """Chunk whose text is shown."""

    number: int
    begin: int
    end: int
    reads: int
    share: float
    """Share of all (layer, KV head) and steps that read it."""
    text: str
    colour: str


def draw(path: Path, recording: Recording, tokenizer: Any, options: Options) -> None:
    """Write the picture of a recording under `options` as a PNG."""
    reading = Reading.of(recording.steps)
    entries = _entries(reading, recording, tokenizer, options)
    words = [tokenizer.decode([token]) for token in recording.decoded]
    fact, asked = recording.prompt.fact, recording.asked
    rows = ["totals", "steps"] + (["near"] if fact else [])
    height = max(11.0, 3 + 0.15 * len(words)) + (5 if fact else 0)
    with mpl.rc_context({"font.family": _installed(FONTS), "font.size": 11}):
        figure = Figure(figsize=(20, height), layout="constrained")
        axes = figure.subplot_mosaic(
            [[row, "texts"] for row in rows],
            width_ratios=[2.6, 1], height_ratios=[1, 5, 3][: len(rows)],
        )  # fmt: skip
        figure.suptitle(_title(recording, options), fontsize=15)
        _draw_totals(axes["totals"], reading, entries)
        _draw_steps(axes["steps"], reading, words, asked)
        if fact:
            _mark_fact(axes["steps"], fact)
            _draw_near(axes["near"], reading, words, asked, fact)
        _draw_texts(axes["texts"], entries)
        axes["totals"].sharex(axes["steps"])
        axes["totals"].tick_params(labelbottom=False)
        figure.savefig(path, dpi=100, format="png")


def _title(recording: Recording, options: Options) -> str:
    """Return words on how much is read, and on how often the planted fact is."""
    document, fact = recording.prompt.document.shape[1], recording.prompt.fact
    words = (
        f"Which chunks of a document of {document:,} tokens each decode step reads from: "
        f"at most {options.budget or document:,} tokens per KV head (policy {options.policy})"
    )
    if fact is None:
        return words
    answer = recording.steps[max(recording.asked - 1, 0) :]
    seen = sum(
        any(bool(((call.tokens >= fact.start) & (call.tokens < fact.stop)).any()) for call in step)
        for step in answer
    )
    return f"{words}\nThe planted fact is read in {seen} of the {len(answer)} steps of the answer"


def _entries(
    reading: Reading, recording: Recording, tokenizer: Any, options: Options
) -> list[_Entry]:
    """Return the most read chunks, and the chunk of the planted fact.

    Every step reads the sinks and recent tokens, so that their chunks are left out.
    """
    fact = recording.prompt.fact
    planted = [] if fact is None else [reading.most_read_at(fact.start, fact.stop)]
    end = recording.prompt.document.shape[1] - options.recent
    chunks = reading.most_read(options.sinks, end, LISTED, planted)
    reads = reading.totals
    entries = []
    for number, chunk in enumerate(chunks, start=1):
        begin, end = (int(edge) for edge in reading.edges[chunk : chunk + 2])
        share = reads[chunk] / (len(reading.counts) * reading.readers)
        text = tokenizer.decode(recording.tokens[begin:end])
        colour = FACT_COLOUR if chunk in planted else "black"
        entries.append(_Entry(number, begin, end, int(reads[chunk]), share, text, colour))
    return entries


def _draw_totals(axes: Axes, reading: Reading, entries: Sequence[_Entry]) -> None:
    """Draw how often each chunk was read in all, with the numbers of the entries."""
    reads = reading.totals
    axes.stairs(reads, reading.edges, fill=True, color="steelblue")
    axes.set_ylabel("reads in all")
    axes.set_ylim(0, reads.max() * 1.25)
    for entry in entries:
        axes.annotate(
            str(entry.number), ((entry.begin + entry.end) / 2, entry.reads), xytext=(0, 3),
            textcoords="offset points", ha="center", color=entry.colour, weight="bold",
        )  # fmt: skip


def _draw_steps(axes: Axes, reading: Reading, words: Sequence[str], asked: int) -> None:
    """Draw chunks from left to right and steps downwards; `asked` steps are the question's."""
    mesh = _draw_mesh(axes, reading, words, asked)
    axes.set_ylabel("decode step: question, and below the line answer")
    axes.set_xlabel("position in the document (token); a column is a chunk")
    ticks = range(0, reading.readers + 1, max(1, reading.readers // 8))
    bar = axes.figure.colorbar(mesh, ax=axes, location="bottom", shrink=0.5, aspect=50, ticks=ticks)
    bar.set_label("how many (layer, KV head) read something of the chunk in the step")


def _draw_near(axes: Axes, reading: Reading, words: Sequence[str], asked: int, fact: range) -> None:
    """Draw the steps once more, around the planted fact, whose bounds are lines."""
    _draw_mesh(axes, reading, words, asked)
    axes.set_xlim(max(fact.start - NEAR, 0), min(fact.stop + NEAR, int(reading.edges[-1])))
    for edge in (fact.start, fact.stop):
        axes.axvline(edge, color=FACT_COLOUR)
    axes.set_title("The same around the planted fact, which is between the lines", loc="left")
    axes.set_yticks([])


def _draw_mesh(axes: Axes, reading: Reading, words: Sequence[str], asked: int) -> Any:
    """Draw the counts, and a line below the steps of the question. Return matplotlib's mesh."""
    colours = mpl.colormaps["viridis_r"](np.linspace(0.1, 1, reading.readers))
    mesh = axes.pcolormesh(
        reading.edges, np.arange(len(words) + 1), reading.counts,
        cmap=ListedColormap([(0.96, 0.96, 0.96), *colours]),
        norm=BoundaryNorm(np.arange(reading.readers + 2) - 0.5, reading.readers + 1),
        rasterized=True,
    )  # fmt: skip
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(words)) + 0.5, [_visible(word) for word in words], fontsize=8)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.axhline(asked, color="black", linewidth=1.2)
    return mesh


def _mark_fact(axes: Axes, fact: range) -> None:
    middle = (fact.start + fact.stop) / 2
    for marker, edge in (("v", 1), ("^", 0)):
        axes.plot(
            middle, edge, marker=marker, color=FACT_COLOUR, markersize=9,
            transform=axes.get_xaxis_transform(), clip_on=False,
        )  # fmt: skip
    axes.annotate(
        "planted fact", (middle, 1), xycoords=axes.get_xaxis_transform(), xytext=(8, 3),
        textcoords="offset points", color=FACT_COLOUR, weight="bold",
    )  # fmt: skip


def _draw_texts(axes: Axes, entries: Sequence[_Entry]) -> None:
    """Write the text of the entries."""
    axes.axis("off")
    axes.set_title(
        "Most read chunks, by position\n(of all steps, layers and KV heads)",
        loc="left",
    )
    if not entries:
        axes.text(0, 1, "None but the sinks and recent tokens.", va="top")
    for entry in entries:
        style: dict[str, Any] = {"va": "top", "color": entry.colour, "parse_math": False}
        top = 1 - (entry.number - 1) / LISTED
        where = f"{entry.number}.  tokens {entry.begin:,} to {entry.end - 1:,}"
        axes.text(0, top, f"{where}, read by {entry.share:.0%}", weight="bold", **style)
        lines = textwrap.wrap(_visible(entry.text.strip(" ")), 46, max_lines=3, placeholder=" ...")
        family = _installed(MONOSPACE)
        axes.text(0.03, top - 0.022, "\n".join(lines), family=family, **style)


def _visible(text: str) -> str:
    """Return `text` in one line, with visible signs for line breaks, tabs and lone blanks."""
    if not text.strip(" "):
        return "␣" * len(text)
    return text.replace("\n", "↵").replace("\t", "→")


def _installed(names: Sequence[str]) -> list[str]:
    """Return the installed fonts of `names`; later ones draw what earlier ones lack."""
    known = {font.name for font in font_manager.fontManager.ttflist}
    return [name for name in names if name in known]
