"""Every owner of an index satisfies the protocol that compiled graphs know, and trust is one."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch

from lychee_compile.kernels import out_of_memory
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.gpu.cache_use import CacheUse
from lychee_compile.kernels.gpu.lifecycle import IndexLifecycle
from lychee_compile.kernels.gpu.lychee.layout import SketchLayout
from lychee_compile.kernels.gpu.owners import GrowingCacheIndex, StaticCacheIndex
from lychee_compile.kernels.operators.cache_index import CacheIndex, CacheWrite
from lychee_compile.kernels.operators.reference_owner import ReferenceCacheIndex
from lychee_compile.kernels.trust import Trust
from lychee_compile.runtime.index_owner import IndexOwner

KEY = torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(0))
LAYOUT = SketchLayout.over(KEY)
OWNERS: dict[str, Callable[[], IndexOwner]] = {
    "reference": lambda: ReferenceCacheIndex(IndexConfig()),
    "static": lambda: StaticCacheIndex(LAYOUT, KEY.device),
    "growing": GrowingCacheIndex,
}
METHODS = [name for name in vars(IndexOwner) if not name.startswith("_")]


@pytest.fixture(params=OWNERS.values(), ids=OWNERS.keys())
def owner(request: pytest.FixtureRequest) -> IndexOwner:
    return request.param()


def test_an_owner_has_all_that_graphs_use(owner: IndexOwner) -> None:
    assert isinstance(owner, IndexOwner)
    assert isinstance(owner.tensor, torch.Tensor)
    assert {"distrust", "delay_build", "after_call"} <= set(METHODS)


@pytest.mark.parametrize("name", ["distrust", "delay_build", "after_call"])
def test_an_owner_takes_the_arguments_of_the_protocol(owner: IndexOwner, name: str) -> None:
    wanted = list(inspect.signature(getattr(IndexOwner, name)).parameters)[1:]
    assert list(inspect.signature(getattr(owner, name)).parameters) == wanted


def test_a_new_owner_may_be_distrusted_and_delayed(owner: IndexOwner) -> None:
    owner.distrust()
    owner.delay_build()
    owner.after_call(KEY, CacheUse("decode_lychee_f32", lambda cache: cache, 1, LAYOUT, "lychee"))


def test_a_lifecycle_alone_cannot_be_used() -> None:
    with pytest.raises(TypeError, match="abstract"):
        IndexLifecycle()  # type: ignore[abstract]


def test_what_was_given_up_is_never_trusted_again() -> None:
    out_of_memory.warn_of_memory.cache_clear()
    given_up = GrowingCacheIndex()
    given_up.give_up()
    use = CacheUse("decode_lychee_f32", lambda cache: cache, 1, None, "lychee")
    for _ in range(5):
        given_up.distrust()
        given_up.after_call(KEY, use)
    assert given_up.trust is Trust.GIVEN_UP
    assert given_up.index_for(KEY, None) is None
    out_of_memory.warn_of_memory.cache_clear()


def test_the_references_index_is_trusted_again_once_it_was_compared() -> None:
    index = CacheIndex(KEY, IndexConfig())
    assert index.trust is Trust.TRUSTED
    index.distrust()
    assert index.trust is Trust.DISTRUSTED
    index.update(KEY, CacheWrite(torch.tensor([0]), torch.arange(64)[None], None), build=True)
    assert index.trust is Trust.TRUSTED


def test_distrust_does_not_bring_back_an_index_that_was_given_up() -> None:
    index = CacheIndex(KEY, IndexConfig())
    index.trust = Trust.GIVEN_UP
    index.distrust()
    assert index.trust is Trust.GIVEN_UP
