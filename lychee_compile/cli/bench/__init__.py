"""The command `bench`: time per token of a model on this machine, dense and sparse."""

from __future__ import annotations
