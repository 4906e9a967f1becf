"""Groups of keys that differ in length: chunks of neighbours, and clusters of what is alike."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field

from lychee_compile.kernels.config import IndexConfig

USUAL_CHUNK = 12
"""Usual number of keys of a chunk."""


@dataclass(frozen=True)
class Chunks:
    """Neighbouring keys between strong boundaries, the same for all KV heads of a row.

    Lengths are those of the option `chunk`, boundaries those of the option `boundaries`. The first
    chunk begins at slot 0. The last keys, which are in no chunk yet, are always read.
    """

    size: int = field(default=USUAL_CHUNK, init=False)
    """Usual number of slots."""


@dataclass(frozen=True)
class Clusters:
    """Groups of the level below whose mean keys have like directions, for each KV head apart.

    They are made by k-means when the cache is first indexed, and anew when there are twice as many
    groups to cluster. In between, new groups are added to the cluster most like them, now and then;
    until then they belong to no cluster, and are always looked into.
    """

    limited: bool = False
    """True if there are at most as many as the option `coarse_units` says; else they have as many
    members as the option `cluster_chunks` says, on average."""

    @property
    def size(self) -> int:
        """Usual number of slots."""
        return 4 * USUAL_CHUNK * (64 if self.limited else 1)


@dataclass(frozen=True)
class TokenClusters:
    """Single keys of like direction, for each KV head apart, behind the sinks.

    They are made by k-means. New keys wait until there are enough, and are always read meanwhile;
    then they get clusters of their own, and older clusters stay as they are.
    """

    size: int
    """Mean number of keys of a cluster."""
    window: int
    """Number of new keys that are clustered together."""


@dataclass(frozen=True)
class GroupSettings:
    """The options that say how chunks are cut and clusters are made."""

    chunk: tuple[int, int] = (8, 16)
    """Lengths of the shortest and the longest chunk."""
    by_similarity: bool = True
    """True if chunks end where neighbouring keys differ, False if all have the longest length."""
    cluster_chunks: int = 4
    """Mean number of chunks in a cluster, and of clusters in a limited one."""
    coarse_units: int = 64
    """Largest number of limited clusters."""
    seed: int = 0
    """Seed of the k-means."""
    sinks: int = 16
    """Number of first keys that are in no cluster of tokens."""

    @classmethod
    def of(cls, config: IndexConfig) -> GroupSettings:
        """Return the settings of these options."""
        return cls(
            config.chunk,
            config.boundaries in ("auto", "similarity"),
            config.cluster_chunks,
            config.coarse_units,
            config.seed,
            config.sinks,
        )

    @property
    def arguments(self) -> tuple[object, ...]:
        """The values of all settings, in order."""
        return astuple(self)

    def chunks_in(self, slots: int) -> int:
        """Return how many numbers the chunks of so many slots have."""
        return -(-slots // self.chunk[0])

    def most_clusters(self, limited: bool, members: int) -> int:
        """Return how many clusters `members` groups can have at most."""
        if limited:
            return self.coarse_units
        return 2 * -(-members // self.cluster_chunks) + -(-members // 256) + 8
