"""Sites and softmaxes that differ in nothing but their name, under one name pattern."""

from __future__ import annotations

from collections.abc import Sequence

from lychee_compile.passes.reasons import Reason
from lychee_compile.passes.site import RejectedSite, Site
from lychee_compile.report.name_patterns import collapse


def group_sites(sites: Sequence[Site]) -> list[tuple[str, list[Site]]]:
    """Return groups of sites that are equal but for their names, each with its name pattern.

    Groups come in the order in which their sites appear.
    """
    alike: dict[tuple[object, ...], list[Site]] = {}
    for site in sites:
        facts = tuple(value for name, value in vars(site).items() if name != "name")
        alike.setdefault(facts, []).append(site)
    groups = []
    for members in alike.values():
        for pattern, indices in collapse([site.name for site in members]):
            groups.append((pattern, [members[index] for index in indices]))
    return groups


def rejection_lines(rejected: Sequence[RejectedSite]) -> list[str]:
    """Return a line for each kind of softmax that is no attention, with its reason."""
    alike: dict[tuple[str, Reason], list[str]] = {}
    for each in rejected:
        alike.setdefault((each.source, each.reason), []).append(each.name)
    return [
        f"- no attention: {pattern} ({source}): {reason} [{reason.code}]"
        for (source, reason), names in alike.items()
        for pattern, _ in collapse(names)
    ]


def reason_lines(sites: Sequence[Site]) -> list[str]:
    """Return a line for each group of sites that have a reason: name, source, reason and code."""
    return [
        f"{pattern or '(unnamed)'} ({members[0].source}): {reason} [{reason.code}]"
        for pattern, members in group_sites(sites)
        if (reason := members[0].reason) is not None
    ]
