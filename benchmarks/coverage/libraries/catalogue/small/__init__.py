"""Model classes of small libraries, most of them with a single idea about attention."""

from __future__ import annotations

from benchmarks.coverage.libraries.catalogue.small.chunks import SMALL_CHUNKS
from benchmarks.coverage.libraries.catalogue.small.others import SMALL_OTHERS
from benchmarks.coverage.libraries.catalogue.small.sparse import SMALL_SPARSE

SMALL = (*SMALL_CHUNKS, *SMALL_SPARSE, *SMALL_OTHERS)
