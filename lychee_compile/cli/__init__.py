"""Commands of `python -m lychee_compile`: `explain`, `bench` and `evaluate`.

    python -m lychee_compile explain DIR --context 32k,128k
    python -m lychee_compile bench DIR --context 32k --batch 1,8
    python -m lychee_compile evaluate tasks --model DIR --tasks ruler --length 4k,8k

Every command has `--help` and `--json`. An error that a user can mend is one line on stderr.
"""

from __future__ import annotations
