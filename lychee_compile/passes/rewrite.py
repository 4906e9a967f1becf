"""Put what was decided in the place of attentions: operators and kernels, emitted and tried.

    out = scaled_dot_product_attention(q, k, v, mask)                   before
    out = sparse_decode(q, k, v, [length], None, positions, index, "decode_lychee_bf16_g4_...")

The graphs before and after for each outcome are shown in the modules of `lower` that emit it:
`reference_site`, `decode_site`, `prefill_site`, `sdpa_site`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch.fx

from lychee_compile import torch_private
from lychee_compile.passes import reasons
from lychee_compile.passes.decide import Plan
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.detect.caching.caches import CacheBinding
from lychee_compile.passes.graph.check import RewriteError
from lychee_compile.passes.graph.dataflow import module_path
from lychee_compile.passes.graph.dead_code import erase_dead_code
from lychee_compile.passes.lower.context import LoweringContext
from lychee_compile.passes.lower.kernel_support import NoKernel
from lychee_compile.passes.lower.reference_site import emit_token_note, knows_tokens
from lychee_compile.passes.outcomes import Emitted, Outcome
from lychee_compile.passes.reasons import Reason

logger = logging.getLogger(__name__)


def rewrite(
    gm: torch.fx.GraphModule, plans: Sequence[Plan], context: LoweringContext
) -> list[Plan]:
    """Rewrite `gm` in place, and return the plans with the outcomes there were in the end.

    If what was decided fails, the next best is tried; at last the attention stays as it was.
    """
    emitted = [_emitted(plan.outcome, context) for plan in plans]
    for plan, (output, _) in zip(plans, emitted, strict=True):
        old = plan.attention.node
        if output is not old:
            old.replace_all_uses_with(output)
            gm.graph.erase_node(old)  # FX would keep it if it takes it for impure
    erase_dead_code(gm)
    return [
        replace(plan, outcome=outcome) for plan, (_, outcome) in zip(plans, emitted, strict=True)
    ]


def _emitted(outcome: Outcome, context: LoweringContext) -> Emitted:
    """Emit an outcome, or the first one to try instead that can be emitted.

    Whatever a failed attempt has emitted is erased. To keep an attention never fails.
    """
    node = outcome.attention.node
    while True:
        try:
            with context.emit.graph.inserting_before(node), context.emit.attempt():
                return outcome.emit(context)
        except (NoKernel, RewriteError) as error:
            outcome = outcome.instead(error.reason)
        except torch_private.RestartAnalysis:
            raise
        except Exception as error:  # noqa: BLE001  whatever it is, the model must run
            outcome = outcome.instead(_failed(node, error))


def _failed(node: torch.fx.Node, error: Exception) -> Reason:
    """Warn of an error that no pass should raise, and return it as a reason."""
    failed = reasons.REWRITE_FAILED(error=reasons.brief(error))
    verbose = logger.isEnabledFor(logging.DEBUG)
    logger.warning("%s: %s", module_path(node), failed.words, exc_info=verbose)
    return failed


def note_prefill(plans: Sequence[Plan], context: LoweringContext) -> None:
    """Let prefills that fill a cache note their tokens, so that chunks end where sentences do.

    A prefill that cannot tell its tokens stays as it is.

        k = index_copy_(k_cache, 2, positions, k_new)
        update_index(k, last_row_of_mask, positions, token_ids, index, 900)     added
        out = scaled_dot_product_attention(q, k, v, mask)
    """
    noted: set[CacheBinding] = set()
    for plan in plans:
        attention, binding = plan.attention, plan.binding
        if isinstance(attention, Attention) and binding is not None and binding not in noted:
            if not knows_tokens(attention, binding, context):
                continue
            try:
                with context.emit.graph.inserting_before(attention.node), context.emit.attempt():
                    emit_token_note(attention, binding, context)
            except RewriteError:
                continue
            except torch_private.RestartAnalysis:
                raise
            except Exception as error:  # noqa: BLE001  the others are rewritten
                _failed(attention.node, error)
                continue
            noted.add(binding)
