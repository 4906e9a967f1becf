"""Shares of the programs of a level in its groups, and the room for what they list."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from lychee_compile.kernels.gpu.levels.layout import LevelLayout
from lychee_compile.kernels.levels.groups import Chunks, Clusters, TokenClusters
from lychee_compile.kernels.reference.clustered import refit_after
from lychee_compile.kernels.sizes import power_of_two

PROGRAMS = 512
"""About how many programs a scan has."""
USUAL_STEPS = 8
"""Times that a program of a scan goes on to further groups, unless rows are very long."""
MOST_TILES = 1024
"""Most programs of a scan for one row, as later kernels load what each has left at once."""
USUAL_EXCESS = 2
"""Ratio of what the kept clusters hold to what they should, at which a scan is not yet slower."""


@dataclass(frozen=True)
class Shares:
    """Shares of the groups of one level of a row among programs."""

    groups: int
    """Groups that the index has room for."""
    items: int
    """Groups that are scored, at most."""
    steps: int
    """Times that a program of the scan takes its groups."""
    tiles: int
    """Programs of the scan."""
    lots: int
    """Parts of the groups that are ranked, each at once."""
    programs: int
    """Programs that rank them."""
    listers: int
    """Programs that list what is in the best."""
    room: int
    """Groups, or slots, in the chosen groups, at most; 0: nothing is listed."""
    lists: bool
    """True if the one program that ranks the groups of a row lists what is in the best too."""


def shares_of_levels(module: ModuleType, layout: LevelLayout, rows: int) -> list[Shares]:
    """Return the shares of each level; `rows` are scanned together."""
    found: list[Shares] = []
    for number, groups in enumerate(layout.groups):
        items = found[-1].room if found else groups
        usual = items
        if layout.in_clusters(number):
            items += groups  # behind the listed ones come those that are in no cluster
            usual = min(_usual(module, layout, number), items)
        scans = -(-usual // getattr(module, f"SCANNED_{number}").value)
        steps = min(power_of_two(-(-rows * scans // PROGRAMS)), USUAL_STEPS)
        steps = max(steps, power_of_two(-(-scans // MOST_TILES)))
        lots, ranks = (-(-each // module.RANKED.value) for each in (items, usual))
        listed = getattr(module, f"LISTED_{number}", None)
        lists = lots == 1 and not layout.in_clusters(number) and listed is None
        listers = ranks
        if listed is not None:
            listers = -(-_usual(module, layout, number + 1) // listed.value)
        room = _room(module, layout, number, items)
        tiles = -(-scans // steps)
        found.append(Shares(groups, items, steps, tiles, lots, ranks, listers, room, lists))
    return found


def _usual(module: ModuleType, layout: LevelLayout, number: int) -> int:
    """Return about how many groups are looked into below clusters; there may be any number."""
    level = layout.stack.levels[number]
    kept = getattr(module, f"KEPT_{number - 1}").value
    new = refit_after(layout.slots) if isinstance(level.groups, Chunks) else 0
    return (USUAL_EXCESS * kept + new) // level.groups.size + 1


def _room(module: ModuleType, layout: LevelLayout, number: int, items: int) -> int:
    """Return how many groups, or slots, the chosen groups of a level have at most.

    Kept clusters may hold all groups, as none is cut and a range that fits is kept whole.
    """
    levels = layout.stack.levels
    groups, is_last = levels[number].groups, number + 1 == len(levels)
    if isinstance(groups, Clusters):
        return layout.groups[number + 1]
    if isinstance(groups, Chunks) and hasattr(module, "LISTED_ROOM"):
        return int(module.LISTED_ROOM.value)
    if isinstance(groups, Chunks):
        return -(-int(module.BUDGET.value) // 16) * 16
    if isinstance(groups, TokenClusters) or groups.size == 1:
        return 0
    if is_last:
        return min(items * groups.size, (module.BUDGET.value // groups.size + 2) * groups.size)
    kept = min(getattr(module, f"KEPT_{number}").value, items)
    room = kept * (groups.size // levels[number + 1].groups.size)
    # A row of children is as long as a row of the bins that they get.
    return -(-room // module.RANKED.value) * module.RANKED.value
