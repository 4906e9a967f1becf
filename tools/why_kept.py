"""Write docs/why-kept.md from the catalogue of reasons.

python -m tools.why_kept            # write the page
python -m tools.why_kept --check    # exit with 1 if the page is not up to date
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lychee_compile.passes import reasons

PAGE = Path(__file__).resolve().parents[1] / "docs" / "why-kept.md"

INTRODUCTION = """\
# Why attention is kept

<!-- Written by `python -m tools.why_kept` from lychee_compile/passes/reasons.py. -->

The report gives a reason for each attention that is not read sparsely, and for each softmax that
belongs to no attention. A reason has a *code*, which stays the same over releases, *words*, and
often a *remedy*. Words in italics are filled in for each attention.

```python
report = lychee_compile.explain(model, *inputs)
for site in report.sites:
    if site.reason is not None:
        print(site.name, site.decision, site.reason.code, site.reason.words, site.reason.remedy)
```

"Kept" attention runs as the model has it. "Exact" attention reads everything by one operator or by
a generated kernel. Both give the results of the model. `options={"strict": True}` turns kept
attention into an error, unless it is meant to be exact.

"""


def page() -> str:
    """Return the whole page as Markdown."""
    return INTRODUCTION + reasons.as_markdown().strip("\n") + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the page. Return the exit status."""
    parser = argparse.ArgumentParser(description="Write docs/why-kept.md from the reasons.")
    parser.add_argument("--check", action="store_true", help="only compare the page")
    chosen = parser.parse_args(arguments)
    text = page()
    if not chosen.check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    sys.stderr.write("docs/why-kept.md is not up to date: run python -m tools.why_kept\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
