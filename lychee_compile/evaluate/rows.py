"""Figures of a policy over captured tensors, as rows of a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Generic, TypeVar

ALL_SITES = "all"


@dataclass(frozen=True, kw_only=True)
class Row:
    """Figures of one policy over one site or all of them."""

    policy: str
    site: str
    mass: float
    """Mean share of the dense softmax mass that was read."""
    mass_p10: float
    """Captured mass that a tenth of all (query, query head) fall short of."""
    mass_worst_head: float
    """Mean captured mass of the query head that captured least."""
    error: float
    """Mean of |o - o_dense| / |o_dense|."""
    error_p90: float


RowT = TypeVar("RowT", bound=Row)


@dataclass(frozen=True, kw_only=True)
class Result(Generic[RowT]):
    """Figures of every policy over one capture, by how much it reads."""

    model: str
    text: str
    length: int
    """Number of keys that the last query sees."""
    configs: dict[str, dict[str, Any]]
    """Options of each policy."""
    rows: list[RowT]
    by: ClassVar[str]
    """Name of the figure of a row that says how much is read."""

    def overall(self) -> list[RowT]:
        """Return the rows over all sites together."""
        return [row for row in self.rows if row.site == ALL_SITES]

    def row(self, policy: str, read: float, site: str = ALL_SITES) -> RowT:
        """Return the row of one policy, of how much is read, and of one site."""
        wanted = policy, read, site
        return next(
            row for row in self.rows if (row.policy, getattr(row, self.by), row.site) == wanted
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain values, for JSON."""
        return {**vars(self), "rows": [asdict(row) for row in self.rows]}

    @property
    def sites(self) -> list[str]:
        """Names of the sites, and `ALL_SITES`."""
        return list(dict.fromkeys(row.site for row in self.rows))

    @property
    def policies(self) -> list[str]:
        """Names of the policies."""
        return list(dict.fromkeys(row.policy for row in self.rows))
