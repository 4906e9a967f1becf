"""Model of lm-evaluation-harness that decodes sparsely: importing this package registers it.

    python -m lychee_compile.harness run --model lychee \\
        --model_args pretrained=DIR,budget=1024 --tasks TASK

    import lm_eval, lychee_compile.harness
    lm_eval.simple_evaluate(model="lychee", model_args={"pretrained": "DIR"}, tasks=["TASK"])

It needs the extra `lm-eval`. Importing it without raises ImportError.
"""

from __future__ import annotations

from lychee_compile.harness.model import LycheeLM

__all__ = ["LycheeLM"]
