"""How good a choice of keys is: measured on tensors of real models, and by what models still do.

    python -m lychee_compile evaluate fidelity --model DIR --policies lychee,quest --out DIR

`capture` takes queries, keys and values from a model through the backend; `fidelity` and `drift`
replay any policy over them; `tasks` asks a model questions that it reads sparsely.
"""

from __future__ import annotations
