"""Model classes of diffusers: denoisers and autoencoders."""

from __future__ import annotations

from benchmarks.coverage.libraries.catalogue.diffusers.autoencoders import AUTOENCODERS
from benchmarks.coverage.libraries.catalogue.diffusers.transformers import TRANSFORMERS
from benchmarks.coverage.libraries.catalogue.diffusers.unets import UNETS
from benchmarks.coverage.libraries.catalogue.diffusers.video import VIDEO
from benchmarks.coverage.libraries.entries import Library

DIFFUSERS = Library(
    "diffusers",
    ["diffusers", "importlib_metadata", "zipp"],
    [*UNETS, *TRANSFORMERS, *VIDEO, *AUTOENCODERS],
)
