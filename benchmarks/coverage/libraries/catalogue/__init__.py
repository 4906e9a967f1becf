"""Model classes of the coverage table, a file for each library or group of small ones."""

from __future__ import annotations

from benchmarks.coverage.libraries.catalogue.timm import TIMM
from benchmarks.coverage.libraries.catalogue.vit_pytorch import VIT_PYTORCH
from benchmarks.coverage.libraries.catalogue.x_transformers import X_TRANSFORMERS

LIBRARIES = (TIMM, VIT_PYTORCH, X_TRANSFORMERS)
"""Every library of the table."""
