"""A picture of which chunks of a document each decode step read from."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from long_document_run import Recording
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from lychee_compile import Options
from lychee_compile.recorder import Call

LISTED = 12  # chunks whose text is shown
FACT_COLOUR = "crimson"
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei")
MONOSPACE = ("DejaVu Sans Mono", "Noto Sans Mono CJK SC", "WenQuanYi Zen Hei Mono")


@dataclass(frozen=True)
class Reading:
    """What was read when."""

    edges: np.ndarray
    """First token of each chunk, and the end of the last: int64 [chunks + 1]."""
    counts: np.ndarray
    """How many (layer, KV head) read something of a chunk: int64 [steps, chunks]."""
    readers: int
    """How many (layer, KV head) there are."""

    @classmethod
    def of(cls, steps: Sequence[Sequence[Call]]) -> Reading:
        """The reading of batch row 0, by the chunks that there were in the end."""
        edges = _edges(steps[-1][0])
        counts = np.zeros((len(steps), len(edges) - 1), dtype=np.int64)
        for row, calls in zip(counts, steps, strict=True):
            for call in calls:
                for tokens in call.tokens[0, :, 0].numpy():
                    chunks = np.searchsorted(edges, tokens[tokens >= 0], side="right") - 1
                    row[np.unique(chunks)] += 1
        return cls(edges, counts, sum(call.tokens.shape[1] for call in steps[-1]))

    @property
    def totals(self) -> np.ndarray:
        """How often each chunk was read in all: int64 [chunks]."""
        return np.asarray(self.counts.sum(0))

    def most_read_at(self, begin: int, end: int) -> int:
        """Of the chunks that hold some of the tokens [begin, end), the most read one."""
        outside = (self.edges[:-1] >= end) | (self.edges[1:] <= begin)
        return int(np.argmax(np.where(outside, -1, self.totals)))

    def most_read(self, begin: int, end: int, count: int, first: Sequence[int]) -> list[int]:
        """The `count` most read chunks in the tokens [begin, end), in the document's order.

        Among them `first`, and none so near another that their numbers would cover each other.
        """
        totals = self.totals
        apart = (end - begin) / (2 * count)
        chosen = list(first)
        for chunk in np.argsort(-totals, kind="stable").tolist():
            inside = begin <= self.edges[chunk] and self.edges[chunk + 1] <= end
            near = any(abs(self.edges[chunk] - self.edges[other]) < apart for other in chosen)
            if inside and totals[chunk] and not near and len(chosen) < count:
                chosen.append(chunk)
        return sorted(chosen)


def _edges(call: Call) -> np.ndarray:
    chunks = call.chunk_lengths[0] > 0
    starts = call.chunk_starts[0][chunks].numpy()
    return np.unique([*starts, call.kv_len])


@dataclass(frozen=True)
class _Entry:
    """A chunk whose text is shown."""

    number: int
    begin: int
    end: int
    reads: int
    share: float
    """Of all (layer, KV head) in all steps."""
    text: str
    colour: str


def draw(path: Path, recording: Recording, tokenizer: Any, options: Options) -> None:
    """Write the picture of a recording, whose `options` these were, as a PNG."""
    reading = Reading.of(recording.steps)
    entries = _entries(reading, recording, tokenizer, options)
    words = [tokenizer.decode([token]) for token in recording.decoded]
    height = max(11.0, 3 + 0.15 * len(words))
    with mpl.rc_context({"font.family": _installed(FONTS), "font.size": 11}):
        figure = Figure(figsize=(20, height), layout="constrained")
        axes = figure.subplot_mosaic(
            [["totals", "texts"], ["steps", "texts"]], width_ratios=[2.6, 1], height_ratios=[1, 5]
        )
        figure.suptitle(
            f"Which chunks of a document of {recording.prompt.document.shape[1]:,} tokens each "
            f"decode step read from (policy {options.policy}, budget {options.budget:,})",
            fontsize=15,
        )
        _draw_totals(axes["totals"], reading, entries)
        _draw_steps(axes["steps"], reading, words, asked=recording.prompt.question.shape[1])
        if recording.prompt.fact is not None:
            _mark_fact(axes["steps"], recording.prompt.fact)
        _draw_texts(axes["texts"], entries)
        axes["totals"].sharex(axes["steps"])
        axes["totals"].tick_params(labelbottom=False)
        figure.savefig(path, dpi=100, format="png")


def _entries(
    reading: Reading, recording: Recording, tokenizer: Any, options: Options
) -> list[_Entry]:
    """The most read chunks, and that of the planted fact.

    Every step reads the sinks and what was recent: those chunks are left out.
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
    """How often each chunk was read in all, with the numbers of the entries."""
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
    """The chunks along the document, the steps downwards, the first `asked` of the question."""
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
    axes.set_ylabel("decode step: question, and below the line answer")
    axes.set_xlabel("position in the document (token); a column is a chunk")
    ticks = range(0, reading.readers + 1, max(1, reading.readers // 8))
    bar = axes.figure.colorbar(mesh, ax=axes, location="bottom", shrink=0.5, aspect=50, ticks=ticks)
    bar.set_label("how many (layer, KV head) read something of the chunk in the step")


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
    """The text of the entries."""
    axes.axis("off")
    axes.set_title(
        "Most read chunks, by position\n(of all steps, layers and KV heads)",
        loc="left",
    )
    if not entries:
        axes.text(0, 1, "None but the sinks and what was recent.", va="top")
    for entry in entries:
        place: dict[str, Any] = {"va": "top", "color": entry.colour, "parse_math": False}
        top = 1 - (entry.number - 1) / LISTED
        where = f"{entry.number}.  tokens {entry.begin:,} to {entry.end - 1:,}"
        axes.text(0, top, f"{where}, read by {entry.share:.0%}", weight="bold", **place)
        lines = textwrap.wrap(_visible(entry.text.strip(" ")), 46, max_lines=3, placeholder=" ...")
        family = _installed(MONOSPACE)
        axes.text(0.03, top - 0.022, "\n".join(lines), family=family, **place)


def _visible(text: str) -> str:
    """Text in one line, with line breaks, tabs and lone blanks to be seen."""
    if not text.strip(" "):
        return "␣" * len(text)
    return text.replace("\n", "↵").replace("\t", "→")


def _installed(names: Sequence[str]) -> list[str]:
    """Those fonts of `names` that there are: the later ones help out for other scripts."""
    known = {font.name for font in font_manager.fontManager.ttflist}
    return [name for name in names if name in known]
