"""Model classes of the coverage table, a file for each library or group of small ones."""

from __future__ import annotations

from benchmarks.coverage.libraries.catalogue.decoders import LITGPT, TORCHSCALE, TORCHTUNE
from benchmarks.coverage.libraries.catalogue.diffusers import DIFFUSERS
from benchmarks.coverage.libraries.catalogue.medical import MONAI, SEGMENT_ANYTHING
from benchmarks.coverage.libraries.catalogue.pairs import ESM, OPEN_CLIP
from benchmarks.coverage.libraries.catalogue.small import SMALL
from benchmarks.coverage.libraries.catalogue.timm import TIMM
from benchmarks.coverage.libraries.catalogue.torch_libraries import TORCHAUDIO, TORCHVISION
from benchmarks.coverage.libraries.catalogue.vit_pytorch import VIT_PYTORCH
from benchmarks.coverage.libraries.catalogue.x_transformers import X_TRANSFORMERS

LIBRARIES = (
    TIMM,
    VIT_PYTORCH,
    TORCHVISION,
    DIFFUSERS,
    MONAI,
    SEGMENT_ANYTHING,
    OPEN_CLIP,
    X_TRANSFORMERS,
    LITGPT,
    TORCHTUNE,
    TORCHSCALE,
    ESM,
    TORCHAUDIO,
    *SMALL,
)
"""Every library of the table."""
