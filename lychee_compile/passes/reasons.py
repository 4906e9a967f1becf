"""Every reason why an attention is kept or exact, or why a softmax belongs to no attention.

A `ReasonKind` is one row of the catalogue below. Calling a kind with its facts gives a `Reason`:

    reasons.WITHIN_BUDGET(kv_len=512, budget=1024)
    Reason("within-budget", "the key length 512 is within the budget of 1024 tokens",
           "decode a longer context, or set a smaller budget")

Codes are stable: programs compare codes, people read words and remedies. `as_markdown` renders the
catalogue for the documentation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Self


class Group(StrEnum):
    """Headings under which the documentation lists reasons."""

    BY_DESIGN = "Exact by design"
    OPERANDS = "Operands"
    SCORE = "Score and mask"
    WEIGHTS = "Attention weights"
    CACHE = "Cache"
    KERNEL = "Device and kernel"
    NO_ATTENTION = "Softmax without attention"
    ANALYSIS = "Analysis and rewrite"


@dataclass(frozen=True, eq=False)
class Reason(str):  # noqa: SLOT000  the fields need a place
    """One reason, filled in for one attention or softmax.

    As a str it is the words, followed by the remedy if there is one. So it can be sliced, searched,
    compared, formatted and written as JSON like any text.
    """

    code: str
    """Stable name in kebab-case, "within-budget"."""
    words: str
    """Explanation in plain English."""
    remedy: str = ""
    """Action that lifts the reason; empty if there is none."""

    def __new__(cls, code: str, words: str, remedy: str = "") -> Self:  # noqa: ARG004  a field
        """Return a str of the words and the remedy."""
        return super().__new__(cls, f"{words}; {remedy}" if remedy else words)

    def __getnewargs__(self) -> tuple[str, str, str]:  # type: ignore[override]  # of three, not one
        """Return what `__new__` takes, for copies and pickles."""
        return self.code, self.words, self.remedy

    def and_also(self, other: Reason) -> Reason:
        """Return a reason with the code of this one and the words and remedies of both."""
        remedies = dict.fromkeys(each for each in (self.remedy, other.remedy) if each)
        return Reason(self.code, f"{self.words}; {other.words}", "; ".join(remedies))


@dataclass(frozen=True)
class ReasonKind:
    """One row of the catalogue; `template` and `remedy` have fields in braces."""

    code: str
    template: str
    remedy: str
    group: Group

    def __call__(self, **facts: object) -> Reason:
        """Return the reason with `facts` in its fields. Raise KeyError if a fact is missing."""
        return Reason(self.code, self.template.format(**facts), self.remedy.format(**facts))


class ReasonedError(Exception):
    """An exception that carries a `Reason`."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason


def brief(error: Exception) -> str:
    """Return the type and the first line of `error`: FX appends whole graphs to its messages."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _kind(group: Group, code: str, template: str, remedy: str = "") -> ReasonKind:
    return ReasonKind(code, template, remedy, group)


# Exact by design: sparse attention would not pay here, or was not asked for.

BUDGET_NONE = _kind(
    Group.BY_DESIGN,
    "budget-none",
    "budget=None asks for exact attention",
    "set budget to a number of tokens",
)
PREFILL = _kind(
    Group.BY_DESIGN,
    "prefill",
    "a query length of {query_len} is a prefill or an encoder, which stays exact",
    'set prefill="sparse" to prune long ones',
)
BELOW_PREFILL_FROM = _kind(
    Group.BY_DESIGN,
    "below-prefill-from",
    "the key length {kv_len} is below prefill_from={prefill_from}",
    "set prefill_from to {kv_len} or less",
)
WITHIN_BUDGET = _kind(
    Group.BY_DESIGN,
    "within-budget",
    "the key length {kv_len} is within the budget of {budget} tokens",
    "decode a longer context, or set a smaller budget",
)
DENSE_LAYERS = _kind(
    Group.BY_DESIGN,
    "dense-layers",
    "the first attentions of a graph stay exact (dense_layers={dense_layers})",
    "set dense_layers=0",
)
CAUSAL_FROM_FIRST_KEY = _kind(
    Group.BY_DESIGN,
    "causal-from-first-key",
    "is_causal=True aligns the mask to the first key; decoding needs it aligned to the last",
    "pass a mask that is aligned to the last key",
)
POLICY_CANNOT_DECODE = _kind(
    Group.BY_DESIGN,
    "policy-cannot-decode",
    "policy={policy!r} cannot decode: it chooses keys for prefill alone",
    "set policy to one of {known}",
)
POLICY_CANNOT_PREFILL = _kind(
    Group.BY_DESIGN,
    "policy-cannot-prefill",
    "policy={policy!r} cannot choose keys for prefill",
    "set policy to one of {known}",
)
QUERY_LEN_SYMBOLIC = _kind(
    Group.BY_DESIGN,
    "query-length-symbolic",
    "the query length ({query_len}) is symbolic, so no decode kernel can be chosen when compiling",
    "decode with a fixed number of query positions",
)
FUSED_MODULE = _kind(
    Group.BY_DESIGN,
    "fused-module",
    "one operator of PyTorch computes the whole module exactly",
    "call torch.backends.mha.set_fastpath_enabled(False) before compiling",
)

# Operands.

GRADIENTS = _kind(
    Group.OPERANDS,
    "gradients",
    "the call needs gradients, and sparse attention has no backward pass",
    "call the model under torch.no_grad()",
)
DTYPE_UNSUPPORTED = _kind(
    Group.OPERANDS,
    "dtype-unsupported",
    "the dtype {dtype} of queries, keys or values is not supported",
    "use float32, bfloat16 or float16",
)
MIXED_DTYPES = _kind(
    Group.OPERANDS,
    "mixed-dtypes",
    "{name} are {dtype} and queries {query_dtype}, but kernels read a single dtype",
    "cast queries, keys and values to one dtype",
)
MIXED_DEVICES = _kind(
    Group.OPERANDS,
    "mixed-devices",
    "{name} are on {device} and queries on {query_device}",
    "put queries, keys and values on one device",
)
SIZE_SYMBOLIC = _kind(
    Group.OPERANDS,
    "size-symbolic",
    "{name} ({size}) is symbolic, so it is not known when compiling",
    "do not mark that dimension as dynamic",
)
HEAD_TOO_LARGE = _kind(
    Group.OPERANDS,
    "head-too-large",
    "the size of a {name} is {size}, and kernels take at most {limit}",
)
HEAD_NOT_A_MULTIPLE = _kind(
    Group.OPERANDS,
    "head-not-a-multiple",
    "the size of a key is {size}, and sparse kernels need a multiple of {multiple}",
)
OPERANDS_LAYOUT = _kind(
    Group.OPERANDS,
    "operands-layout",
    "the layout of queries, keys or values could not be followed through the graph",
)
COPIED_OPERAND = _kind(
    Group.OPERANDS,
    "layout-needs-a-copy",
    "kernels cannot read the memory layout of the {name} without a copy at every step",
    "store the {name} as [batch, heads, tokens, features], in any order of these four",
)
UNWANTED_AXES = _kind(
    Group.OPERANDS,
    "unwanted-axes",
    "the tensor {tensor} has more axes than its operand can have",
)
SEVERAL_SIZES_UNKNOWN = _kind(
    Group.OPERANDS,
    "several-sizes-symbolic",
    "one dimension of an operand holds several axes of symbolic size",
    "compile with fewer dynamic dimensions",
)
SIZE_NOT_IN_GRAPH = _kind(
    Group.OPERANDS,
    "size-not-in-graph",
    "an operand or a mask must be repeated, and no tensor tells how often",
    "compile with fewer dynamic dimensions",
)

# Score and mask.

SCORES_OTHER = _kind(
    Group.SCORE,
    "scores-changed",
    "scores pass through {step}, which is not understood",
)
SCORES_MIXED = _kind(
    Group.SCORE,
    "scores-mixed",
    "the scores of several heads are mixed before the softmax, by {operator}",
)
SCORES_TIMES_PER_KEY = _kind(
    Group.SCORE,
    "scores-scaled-per-key",
    "scores are multiplied by a tensor that differs from key to key",
)
SCORES_TIMES_LATE = _kind(
    Group.SCORE,
    "scores-scaled-late",
    "scores are multiplied by a tensor after a bias, a mask, an extra logit or a soft-cap",
    "scale the queries before their product with the keys",
)
SCORES_TIMES_UNKNOWN = _kind(
    Group.SCORE,
    "scores-scaled-by-unknown",
    "scores are multiplied by a tensor whose layout could not be followed through the graph",
)
SCORES_REVERSED = _kind(
    Group.SCORE,
    "scores-reversed",
    "scores are multiplied by {value}, which may reverse their order",
    "use a positive scale",
)
SCORES_REPLACED = _kind(
    Group.SCORE,
    "scores-replaced",
    "a condition replaces scores by a number that does not hide their keys",
    "fill hidden scores with -inf or the lowest number of their dtype",
)
SCORES_OWN_KEY = _kind(
    Group.SCORE,
    "scores-own-key",
    "the key at a query's own position is hidden by a finite number, and counts if the query sees "
    "no other key",
    "fill it with -inf",
)
SCORES_LEVELS = _kind(
    Group.SCORE,
    "scores-hidden-by-levels",
    "keys are hidden by numbers of different size, {levels}: a row that sees no other key sees "
    "those that the smaller number hides",
    "hide all of them by the same number",
)
SCORES_ZEROED = _kind(
    Group.SCORE,
    "scores-zeroed",
    "scores of visible keys are set to zero",
    "fill hidden scores with -inf: a score of zero still has weight",
)
BIAS_LAYOUT = _kind(
    Group.SCORE,
    "bias-layout",
    "the layout of a bias on the scores could not be followed through the graph",
)
BIAS_AFTER_EXTRA_LOGIT = _kind(
    Group.SCORE,
    "bias-after-extra-logit",
    "a bias is added after an extra logit was appended to the scores",
    "add the bias first",
)
SCORES_HIDDEN = _kind(
    Group.SCORE,
    "scores-all-hidden",
    "a number that is added to the scores hides every key",
)
MASK_LAYOUT = _kind(
    Group.SCORE,
    "mask-layout",
    "the layout of a mask on the scores could not be followed through the graph",
)
EXTRA_LOGIT_LAYOUT = _kind(
    Group.SCORE,
    "extra-logit-layout",
    "the layout of an extra logit could not be followed through the graph",
)
EXTRA_LOGIT_UNSHIFTED = _kind(
    Group.SCORE,
    "extra-logit-unshifted",
    "a number is added to the scores of all keys, and not to the extra logit beside them",
    "append the extra logit first",
)
EXTRA_LOGIT_NUMBER = _kind(
    Group.SCORE,
    "extra-logit-number",
    "an extra logit is a plain number in the sum of exponentials, and no tensor holds it",
    "append a tensor of that logit to the scores before the softmax",
)
SOFTCAP_AFTER_BIAS = _kind(
    Group.SCORE,
    "softcap-after-bias",
    "a soft-cap is applied after a bias, a mask, an extra logit or another soft-cap",
    "apply one soft-cap, before all of these",
)
FLEX_CHOICE = _kind(
    Group.SCORE,
    "flex-score-choice",
    "the score_mod of FlexAttention chooses between scores",
)
FLEX_SCORE = _kind(
    Group.SCORE,
    "flex-score",
    "the score_mod of FlexAttention is more than a scale and a soft-cap",
)
FLEX_BLOCK_MASK = _kind(
    Group.SCORE,
    "flex-block-mask",
    "FlexAttention reads exactly the blocks that its BlockMask lists",
)
FLEX_NO_MASK = _kind(
    Group.SCORE,
    "flex-no-mask-tensor",
    "FlexAttention computes its mask inside, so no other operator can read it",
)

# Attention weights.

WEIGHTS_RETURNED = _kind(
    Group.WEIGHTS,
    "weights-returned",
    "the attention {what} are returned, so all of them must be computed",
    "do not return them (output_attentions=False or need_weights=False)",
)
WEIGHTS_USED = _kind(
    Group.WEIGHTS,
    "weights-used-elsewhere",
    "the attention {what} are used elsewhere, by {user}",
)
DROPOUT = _kind(
    Group.WEIGHTS,
    "dropout",
    "dropout {probability} is applied to the attention weights",
    "call model.eval()",
)
WEIGHTS_MASKED = _kind(
    Group.WEIGHTS,
    "weights-masked",
    "attention weights are masked after the softmax",
    "mask the scores before the softmax",
)
WEIGHTS_CHANGED = _kind(
    Group.WEIGHTS,
    "weights-changed",
    "attention weights are changed after the softmax, by {operator}",
)
WEIGHTS_PARTLY_USED = _kind(
    Group.WEIGHTS,
    "weights-partly-used",
    "only some of the attention weights are multiplied with values",
)
WEIGHTS_WRONG_ROW = _kind(
    Group.WEIGHTS,
    "weights-other-row",
    "attention weights are divided by the sum of another row",
)
SUM_MISPLACED = _kind(
    Group.WEIGHTS,
    "sum-misplaced",
    "the sum of exponentials divides something other than the output of the attention",
)
SUM_CHANGED = _kind(
    Group.WEIGHTS,
    "sum-changed",
    "the sum of exponentials is changed before it divides",
    "divide by the sum itself",
)
SUM_IN_CHUNKS = _kind(
    Group.WEIGHTS,
    "sum-in-chunks",
    "the softmax is computed over {count} chunks of keys that are joined by their sums, "
    "which is not rewritten yet",
    "compute all scores of a query at once, or call scaled_dot_product_attention",
)
LSE_USED = _kind(
    Group.WEIGHTS,
    "log-sum-exp-used",
    "the log-sum-exp of the attention is used too",
    "do not ask FlexAttention for the log-sum-exp",
)

# Cache.

NO_CACHE = _kind(
    Group.CACHE,
    "no-cache",
    "the keys are not read from a KV cache",
    "decode with a KV cache",
)
CACHE_ROLLS = _kind(
    Group.CACHE,
    "cache-rolls",
    "a sliding-window cache rolls, so every key changes its slot at every step",
)
CACHE_KEEPS_PART = _kind(
    Group.CACHE,
    "cache-keeps-part",
    "the cache keeps only a part of these keys, as a sliding window does",
)
CACHE_SLICED = _kind(
    Group.CACHE,
    "cache-sliced",
    "the keys are a slice of the cache, as in a sliding window",
)
CACHE_WRITE_UNKNOWN = _kind(
    Group.CACHE,
    "cache-write-unknown",
    "the write to the cache has a form that is not understood",
    "write the cache with index_copy_ at token positions",
)
CACHE_NOT_BY_TOKEN = _kind(
    Group.CACHE,
    "cache-not-by-token",
    "the cache is written at other indices than token positions",
    "write whole tokens, at a 1-dimensional tensor of positions",
)
CACHE_ROWS_APART = _kind(
    Group.CACHE,
    "cache-rows-apart",
    "entries of the cache that are no rows of the batch are written at positions of their own",
    "write all heads of a row at the same positions",
)
CACHE_REPLACED = _kind(
    Group.CACHE,
    "cache-replaced",
    "the cache is written as a whole, with values that are not the cache and new tokens",
    "write the new tokens alone, with index_copy_ at their positions",
)
CACHE_RESHAPED = _kind(
    Group.CACHE,
    "cache-reshaped",
    "the grown cache is returned in another shape than it is given in",
    "return the cache in the shape in which it is given",
)
CACHE_NOT_RETURNED = _kind(
    Group.CACHE,
    "cache-not-returned",
    "the new tokens go into a copy of the cache that is neither returned nor written back",
    "return the copy, or write the cache in place",
)
CACHE_COMPUTED = _kind(
    Group.CACHE,
    "cache-computed",
    "the keys are computed from the cache anew at each step (by {operators})",
    "store the keys as attention reads them",
)
CACHE_JOINED = _kind(
    Group.CACHE,
    "cache-joined",
    "the keys are put together from several tensors at each step, a cache among them (by cat)",
    "store whole keys in one cache",
)
CACHE_TAIL_MOVES = _kind(
    Group.CACHE,
    "cache-tail-moves",
    "the new keys are joined to a past, but written to no tail that the graph returns, as in a "
    "call that moves a full tail to the past",
    "nothing, if few calls are so; otherwise return a tail that holds the new keys",
)
CACHE_CONVERTED = _kind(
    Group.CACHE,
    "cache-converted",
    "the cache is stored as {dtype} and converted when it is read",
    "store the keys as float32, bfloat16 or float16, or write each token to quantised ones in "
    "place, as LycheeCache does",
)
CACHE_PAGED = _kind(
    Group.CACHE,
    "cache-paged",
    "the keys are gathered from the cache through a table at each step (by {operator})",
    "store the keys of a row side by side",
)
CACHE_STACKED = _kind(
    Group.CACHE,
    "cache-stacked",
    "the cache is a part of a larger tensor, and the graph does not show that its other uses "
    "leave this part alone",
    "pass the keys of each layer as a tensor of their own",
)
CACHE_VIEWED = _kind(
    Group.CACHE,
    "cache-viewed",
    "the cache is given, written or returned in another shape than attention reads it in",
    "keep one shape, [batch, heads, tokens, features]",
)
CACHE_OTHER_AXIS = _kind(
    Group.CACHE,
    "cache-other-axis",
    "the cache is written along another axis than its tokens",
)
CACHE_NOT_INPUT = _kind(
    Group.CACHE,
    "cache-not-an-input",
    "the cache is no input of the graph, or is written more than once",
    "create the cache outside the compiled function and write it once a call",
)
CACHE_WRITTEN_LATE = _kind(
    Group.CACHE,
    "cache-written-late",
    "the cache is written after it is read",
    "write the cache before attending",
)
CACHE_GROWS_IN_PIECES = _kind(
    Group.CACHE,
    "cache-grows-in-pieces",
    "the cache grows by more than one piece in a call",
    "concatenate the new keys first",
)
CACHE_PAST_NOT_INPUT = _kind(
    Group.CACHE,
    "cache-past-not-an-input",
    "the tensor that the cache grows from is no input of the graph",
    "pass the past keys to the compiled function",
)
OPERAND_OVERWRITTEN = _kind(
    Group.CACHE,
    "operand-overwritten",
    "the cache, or another operand, is written after it is read",
    "write the cache before attending",
)
MANY_TOKENS_WRITTEN = _kind(
    Group.CACHE,
    "many-tokens-written",
    "{count} tokens are written to the cache at once, and decode kernels take at most {limit}",
)
POSITIONS_DEVICE = _kind(
    Group.CACHE,
    "positions-device",
    "the positions written to are not on the device of the cache",
    "create the positions on the device of the cache",
)
CACHE_MAY_WRAP = _kind(
    Group.CACHE,
    "cache-may-wrap",
    "the slots written come out of {operator}, as in a ring buffer: older tokens lie behind the "
    "newest, and decode kernels cannot choose among these",
    "set reference=True for the slow PyTorch path, which handles it",
)
KEYS_COMPUTED_NO_KERNEL = _kind(
    Group.CACHE,
    "keys-computed-no-kernel",
    "the keys are computed from what is stored as they are read, and decode kernels cannot compute "
    "them: {why}",
    "set reference=True for the slow PyTorch path, which handles it",
)
CACHE_LAYOUT = _kind(
    Group.CACHE,
    "cache-layout",
    "kernels cannot read the layout of the cache: {error}",
)

# Device and kernel.

DEVICE_UNSUPPORTED = _kind(
    Group.KERNEL,
    "device-unsupported",
    "there are no kernels for device {device} yet, and PyTorch operators would be slower than "
    "dense attention",
    "set reference=True to run those all the same",
)
NO_TRITON = _kind(
    Group.KERNEL,
    "no-triton",
    "Triton is not installed, and kernels need it",
    "install the package triton",
)
GPU_VENDOR = _kind(
    Group.KERNEL,
    "gpu-vendor",
    "there are no kernels for {name} yet: they are written for NVIDIA GPUs",
)
GPU_TOO_OLD = _kind(
    Group.KERNEL,
    "gpu-too-old",
    "{name} has compute capability {have}, and kernels need {need}",
)
POLICY_NO_KERNEL = _kind(
    Group.KERNEL,
    "policy-no-kernel",
    "no GPU kernel supports policy={policy!r}",
    "set policy to {known}, or reference=True for the slow PyTorch path",
)
BOUNDARIES_NO_KERNEL = _kind(
    Group.KERNEL,
    "boundaries-no-kernel",
    "no GPU kernel of policy={policy!r} cuts chunks by token ids, as boundaries='tokens' asks for",
    "set boundaries='auto' or 'similarity', or reference=True for the slow PyTorch path",
)
EPSILON_NO_KERNEL = _kind(
    Group.KERNEL,
    "epsilon-no-kernel",
    "no GPU kernel of a prefill supports epsilon (got {epsilon:g})",
    "set epsilon=None, or reference=True for the slow PyTorch path",
)
EPSILON_NO_BOUND = _kind(
    Group.KERNEL,
    "epsilon-no-bound",
    "kernels have no bound of the keys that policy={policy!r} leaves unread, so that nothing "
    "proves epsilon={epsilon:g}",
    "set epsilon=None or policy to {known}, or reference=True for the slow PyTorch path",
)
COVERAGE_NO_KERNEL = _kind(
    Group.KERNEL,
    "coverage-no-kernel",
    "no GPU kernel of policy={policy!r} supports coverage (got {coverage:g})",
    "set coverage=None or policy to {known}, or reference=True for the slow PyTorch path",
)
KERNEL_FAILED = _kind(
    Group.KERNEL,
    "kernel-failed",
    "no {kind} kernel could be generated and run: {error}",
    "log lychee_compile at level DEBUG to see where it failed",
)

# Softmax without attention.

WEIGHTS_WITHOUT_VALUES = _kind(
    Group.NO_ATTENTION,
    "no-values",
    "the weights of the softmax are not multiplied with values",
)
ONE_KEY = _kind(
    Group.NO_ATTENTION,
    "one-key",
    "the softmax runs over a single element, so there is only one key and its weight is 1",
)
OTHER_AXIS_SUMMED = _kind(
    Group.NO_ATTENTION,
    "other-axis-summed",
    "the softmax runs over another axis than the product after it sums",
)
SCORES_NO_PRODUCT = _kind(
    Group.NO_ATTENTION,
    "no-scores",
    "the scores of the softmax are no product of queries and keys",
)
SCORES_LINEAR = _kind(
    Group.NO_ATTENTION,
    "scores-of-a-linear-layer",
    "the scores of the softmax come from a parameter, as in a linear layer",
)
VALUES_LINEAR = _kind(
    Group.NO_ATTENTION,
    "values-of-a-linear-layer",
    "the values are a parameter, as in a linear layer",
)
OVER_FEATURES = _kind(
    Group.NO_ATTENTION,
    "over-features",
    "the softmax runs over features, not over tokens",
)
NOT_OVER_KEYS = _kind(
    Group.NO_ATTENTION,
    "not-over-keys",
    "the keys or the values do not extend over the axis of the softmax",
)
KEYS_DIFFER = _kind(
    Group.NO_ATTENTION,
    "keys-differ",
    "the keys differ in more than batch, head, token and feature",
)
QUERIES_DIFFER = _kind(
    Group.NO_ATTENTION,
    "queries-differ",
    "the queries differ in more than batch, head, token and feature",
)
WEIGHTS_SUMMED = _kind(
    Group.NO_ATTENTION,
    "more-axes-than-output",
    "the weights or the values have axes that the output lacks",
)

# Analysis and rewrite: mostly faults of the backend itself.

NOT_ANALYSED = _kind(
    Group.ANALYSIS,
    "not-analysed",
    "the analysis failed: {error}",
    "log lychee_compile at level DEBUG to see where it failed",
)
REWRITE_FAILED = _kind(
    Group.ANALYSIS,
    "rewrite-failed",
    "the rewrite failed: {error}",
    "log lychee_compile at level DEBUG to see where it failed",
)
OUTPUT_SHAPE = _kind(
    Group.ANALYSIS,
    "output-shape",
    "the rewritten attention would have shape {found} instead of {wanted}",
)
OUTPUT_DTYPE = _kind(
    Group.ANALYSIS,
    "output-dtype",
    "the rewritten attention would be {found} instead of {wanted}",
)
OUTPUT_COUNT = _kind(
    Group.ANALYSIS,
    "output-count",
    "the rewritten graph would give {found} outputs instead of {wanted}",
)

ALL: tuple[ReasonKind, ...] = tuple(
    each for each in list(globals().values()) if isinstance(each, ReasonKind)
)
"""Every kind, in the order of the documentation."""

_FIELD = re.compile(r"\{(\w+)(?:![rsa])?(?::[^}]*)?\}")


def as_markdown() -> str:
    """Return the catalogue as Markdown, a heading and a table for each group.

    Columns are code, words and what to do; fields of a template are in italics.
    """
    return "\n\n".join(map(_group_table, Group)) + "\n"


def _group_table(group: Group) -> str:
    rows = [
        f"| `{kind.code}` | {_shown(kind.template)} | {_shown(kind.remedy)} |"
        for kind in ALL
        if kind.group is group
    ]
    head = "| code | words | what to do |\n| --- | --- | --- |"
    return "\n".join([f"## {group}\n", head, *rows])


def _shown(template: str) -> str:
    """Return a template with its fields in italics."""
    return _FIELD.sub(r"*\1*", template)
