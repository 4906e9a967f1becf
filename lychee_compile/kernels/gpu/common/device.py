"""Facts of a device that launches depend on."""

from __future__ import annotations

import torch


def overlaps(device: torch.device) -> bool:
    """Return True if a kernel may begin before the one before it has ended, as on Hopper."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def overlapping(early: bool) -> dict[str, bool]:
    """Return the options of a kernel that begins, if `early`, before the one before it ends."""
    return {"launch_pdl": True} if early else {}
