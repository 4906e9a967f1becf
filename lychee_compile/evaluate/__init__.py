"""Evaluation of policies on tensors of real models, and by the answers of models.

    python -m lychee_compile evaluate fidelity --model DIR --policies lychee,quest --out DIR

`capture` takes queries, keys and values from a model through the backend. `fidelity` and `drift`
replay any policy over them. `tasks` asks a model questions about documents that it reads sparsely.
The core of the package does not import this one, whose optional packages are those of the extra
`lychee_compile[evaluate]`.
"""

from __future__ import annotations
