"""Command line of lm-evaluation-harness, with the model `lychee` among its models."""

from __future__ import annotations

from lm_eval.__main__ import cli_evaluate

import lychee_compile.harness  # noqa: F401  registers the model

if __name__ == "__main__":
    cli_evaluate()
