"""Drift: error of an index that follows the keys token by token, beside one built anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lychee_compile.evaluate.errors import EvaluationError
from lychee_compile.evaluate.models import nothing
from lychee_compile.evaluate.replay import Measured, Replay, Truth, dense_truths
from lychee_compile.evaluate.tensors import Capture
from lychee_compile.evaluate.variants import Variant, describe

FOLLOWED, ANEW = "followed", "built anew"


@dataclass(frozen=True)
class DriftPoint:
    """Quality of one index after some generated tokens, over all sites."""

    policy: str
    index: str
    """`FOLLOWED` if the index followed the keys since the prompt, `ANEW` if it is built here."""
    generated: int
    """Number of tokens since the prompt."""
    error: float
    """Mean of |o - o_dense| / |o_dense|."""
    mass: float
    """Mean share of the dense softmax mass that was read."""
    violations: int
    """Number of times that more was missed than the certificate allows; 0 if it is right."""


@dataclass(frozen=True)
class DriftResult:
    """Error against generated tokens, for every policy at one budget."""

    model: str
    text: str
    prompt: int
    """Number of tokens indexed at once."""
    budget: int
    configs: dict[str, dict[str, Any]]
    """Options of each policy."""
    points: list[DriftPoint]

    def curve(self, policy: str, index: str = FOLLOWED) -> list[DriftPoint]:
        """Return the points of one index, in order."""
        return [point for point in self.points if (point.policy, point.index) == (policy, index)]

    def ratio(self, policy: str, generated: int, reference: int = 2048) -> float | None:
        """Return the error near `generated` tokens over the error near `reference`.

        Return None if the curve ends before or the earlier error is 0.
        """
        curve = self.curve(policy)
        if not curve or curve[-1].generated < 0.9 * generated:
            return None

        def error_near(tokens: int) -> float:
            return min(curve, key=lambda point: abs(point.generated - tokens)).error

        earlier = error_near(reference)
        return error_near(generated) / earlier if earlier > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain values, for JSON."""
        return {**vars(self), "points": [asdict(point) for point in self.points]}


def checkpoint_positions(prompt: int, length: int, every: int, queries: int) -> list[int]:
    """Return positions to capture: `queries` in a row after the prompt, then at `every` tokens.

    Raise `EvaluationError` if nothing is generated or the groups would overlap.
    """
    if not 0 < prompt < length:
        raise EvaluationError(f"a prompt of {prompt} tokens leaves nothing of {length} to generate")
    if not 0 < queries <= every:
        raise EvaluationError(
            f"{queries} queries every {every} tokens: at least 1, at most {every}"
        )
    starts = range(prompt, length - queries + 1, every)
    return [start + offset for start in starts for offset in range(queries)]


def drift(
    capture: Capture,
    variants: Sequence[Variant],
    budget: int,
    advance: Callable[[int], object] = nothing,
) -> DriftResult:
    """Replay every variant over a long capture, with an index that follows and with new ones.

    The prompt is all tokens before the first query. It is indexed at once, and later tokens one by
    one. Runs of neighbouring positions are the checkpoints, each of which gives a point. `advance`
    is called with 1 after each checkpoint of each site. Raise `EvaluationError` if there is only
    one checkpoint, and `OptionError` if a policy cannot have the budget.
    """
    groups = _groups(capture.positions.tolist())
    if len(groups) < 2:
        raise EvaluationError(
            "the capture has neighbouring positions alone: a drift curve needs some apart"
        )
    configs = {variant.label: variant.config(budget) for variant in variants}
    parts: dict[tuple[str, str, int], list[Measured]] = {}
    for site in capture.sites:
        replays = {label: Replay(site, capture, each) for label, each in configs.items()}
        truths = dense_truths(site, capture)
        for number, size in enumerate(groups):
            checkpoint = [next(truths) for _ in range(size)]
            for label, replay in replays.items():
                fresh = Replay(site, capture, replay.config)
                for index, each in ((FOLLOWED, replay), (ANEW, fresh)):
                    measured = _follow(each, checkpoint, budget)
                    parts.setdefault((label, index, number), []).append(measured)
            advance(1)
    prompt = int(capture.positions[0])
    starts = [sum(groups[:number]) for number in range(len(groups))]
    generated = [int(capture.positions[start]) - prompt for start in starts]
    points = [
        _point(label, index, generated[number], sites)
        for (label, index, number), sites in parts.items()
    ]
    described = {v.label: describe(v.backend_options(budget)) for v in variants}
    return DriftResult(capture.model, capture.text, prompt, budget, described, points)


def count_checkpoints(capture: Capture) -> int:
    """Return the number of points of each curve."""
    return len(_groups(capture.positions.tolist()))


def _groups(positions: Sequence[int]) -> list[int]:
    """Return the sizes of the runs of neighbouring positions."""
    sizes: list[int] = []
    for number, position in enumerate(positions):
        if number and position == positions[number - 1] + 1:
            sizes[-1] += 1
        else:
            sizes.append(1)
    return sizes


def _follow(replay: Replay, checkpoint: Sequence[Truth], budget: int) -> Measured:
    parts = []
    for truth in checkpoint:
        replay.follow(truth.key.shape[2])
        parts.append(replay.measure(truth, budget))
    return Measured.joined(parts)


def _point(policy: str, index: str, generated: int, sites: Sequence[Measured]) -> DriftPoint:
    count = sum(site.error.numel() for site in sites)
    return DriftPoint(
        policy,
        index,
        generated,
        error=sum(site.error.sum().item() for site in sites) / count,
        mass=sum(site.mass.sum().item() for site in sites) / count,
        violations=sum(int(site.violated.sum()) for site in sites),
    )
