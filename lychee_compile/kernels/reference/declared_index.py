"""Classes of indexes in plain PyTorch, made from the declarations of policies."""

from __future__ import annotations

from lychee_compile.kernels.levels.declaration import LevelStack
from lychee_compile.kernels.levels.groups import TokenClusters
from lychee_compile.kernels.reference.chunk_index import ChunkIndex
from lychee_compile.kernels.reference.level_index import LevelIndex
from lychee_compile.kernels.reference.token_cluster_index import TokenClusterIndex
from lychee_compile.kernels.reference.uneven_index import UnevenIndex


def declared_index(name: str, stack: LevelStack) -> type[LevelIndex | UnevenIndex]:
    """Return the class of the indexes of a declared policy, called after the policy `name`."""
    base: type[LevelIndex | UnevenIndex] = LevelIndex
    if stack.uneven:
        of_tokens = isinstance(stack.levels[-1].groups, TokenClusters)
        base = TokenClusterIndex if of_tokens else ChunkIndex
    return type(
        f"{name.capitalize()}Index",
        (base,),
        {
            "__doc__": f"The plain form of the policy {name!r}.",
            "__module__": __name__,
            "stack": stack,
            "reads_keys": stack.reads_keys,
            "estimates_shares": bool(stack.levels),
            "dense_layers": stack.dense_layers,
        },
    )
