"""Use that a compiled graph makes of a key cache by generated kernels."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torch import Tensor

from lychee_compile.kernels.gpu.common.layout import IndexLayout
from lychee_compile.kernels.gpu.methods import measures, settings_of


@dataclass(frozen=True)
class CacheUse:
    """Use that one graph makes of a key cache with a GPU index."""

    kernel: str
    """Name of the generated module that attends to the cache."""
    keys: Callable[..., Tensor]
    """Views the cache as keys [B, Hkv, L, D]. If keys are computed from more tensors, these are
    further arguments."""
    written: int
    """Number of tokens that a call writes; 0 if the graph only reads."""
    layout: IndexLayout | None
    """Layout of the index; None if the size of the cache is known only when the graph is called."""
    policy: str
    """Name of the policy whose kernels read the index."""

    @property
    def kind(self) -> Hashable:
        """Facts that graphs have in common if they share an index.

        These are the layout, or else the policy, with "measured" or settings of groups if any.
        """
        if self.layout is not None:
            return self.layout
        if measures(self.kernel):
            return self.policy, "measured"
        settings = settings_of(self.kernel)
        return self.policy if settings is None else (self.policy, settings)
