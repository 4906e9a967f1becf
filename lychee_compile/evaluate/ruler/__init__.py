"""Tasks after RULER (arXiv 2404.06654), made of generated text alone.

Needles in a haystack, variables to follow, words to count, and questions about planted facts. Every
task fits a document of any length. Texts, names and numbers are made here, or are the prose that
comes with Python: no files of others are needed, and no model knows the answers.
"""

from __future__ import annotations
