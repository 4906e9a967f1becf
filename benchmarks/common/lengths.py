"""Numbers of tokens as people write them, which the command line of the package parses, too."""

from __future__ import annotations

from lychee_compile.cli.lengths import length_name, positive, tokens

__all__ = ["length_name", "positive", "tokens"]
