"""Compile the kernels of golden modules for a GPU that need not be there.

    python compiled_kernels.py [--hopper] sparse_llama

prints the shared memory of each, in bytes, as JSON. Raises what the compiler raises.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from kernel_specs import SPECS

from lychee_compile.codegen.module import emit_module
from lychee_compile.codegen.specification import AttentionSpec, LoadSpec
from lychee_compile.kernels.gpu.common.module_cache import load, store

KERNELS = {
    "attend_all": {"KEYS": 64},
    "combine": {"SPLITS": 32},
    "query_weights": {"kv_heads": 8, "BLOCK": 8192, "DEALT": True},
    "scan_tokens": {"STEPS": 2, "DEALT": True, "BLOCK": 8192, "BLOCKS": 16, "kv_heads": 8},
    "scan_pages": {"BLOCK": 8192, "BLOCKS": 16, "kv_heads": 8},
    "scan_chosen": {"BLOCK": 8192, "TILES": 16, "kv_heads": 8, "DEALT": True},
    "scan_listed": {"BLOCK": 32768, "BLOCKS": 64, "TILES": 512, "kv_heads": 8},
    "index_chunks": {},
    "choose": {"KEYS": 64, "TILES": 16, "LANES": 2048, "BLOCK": 8192},
    "attend": {"KEYS": 64, "TILES": 16, "LANES": 512, "BLOCK": 8192, "LISTED": False},
    "encode": {"BLOCK": 8192},
    "record_fingerprints": {},
    "compare_keys": {},
    "scan_window": {"SEEN": 4096},
    **{f"scan_{number}": {"STEPS": 4, "TILES": 16} for number in range(3)},
    **{
        f"rank_{number}": {"TILES": 16, "SCAN_TILES": 16, "LOTS": 1, "LISTS": number == 0}
        for number in range(3)
    },
    **{f"list_{number}": {"TILES": 16, "LOTS": 16} for number in range(3)},
    "spread_0": {"TILES": 16},
    "mark_read": {"KEYS": 64},
    "bound_unread": {"STEPS": 4, "BLOCK": 8192},
    "measure": {"BLOCK": 8192},
    "measure_new": {"BLOCK": 8192},
    "weigh_blocks": {},
    "certify": {"SPLITS": 32, "BOUND_TILES": 128},
    "read_uncertified": {"KEYS": 64},
}
"""Kernels of decoding, with the constants that are fixed when they are launched."""
TILE_KERNELS = {
    "summarise_queries": {"KEYS": 64, "TILES": 8, "SELF": True},
    "scan": {"KEYS": 64, "TILES": 16},
    "deal_luck": {"LANES": 4096, "SLOT_BITS": 24},
    "select_keys": {"LANES": 4096, "COVERS": True, "SLOT_BITS": 24},
    "see_tiles": {"QUERIES": 32, "KEYS": 128, "SELF": True},
    "list_keys": {"LANES": 4096},
    "store_edges": {"SELF": True},
    "list_last": {"LANES": 2048},
    "count_levels": {"SHARING": 1, "ASKERS": 16, "LEVELS": 1024, "LANES": 256},
    "list_groups": {"SHARING": 4, "ASKERS": 16, "LEVELS": 1024, "LANES": 256, "KEYS": 2048},
    "attend": {"ROWS": 128, "KEYS": 64, "WARPS": 8, "SLOT_BITS": 24},
}
"""Kernels of prefill, with the constants that are fixed when they are launched."""
POINTERS = {
    "*u8": "fine coarse pages page_bins group_bins bins strength held sighted read silent marks "
    "luck",
    "*i32": "header fingerprints tile_first tile_end histogram ranks plan limits arrivals "
    "channels candidates candidate_count listed listed_count chosen_list edge chosen counts "
    "span waiting label label_1 label_2 tokens_0 first_0 end_0 tokens_1 first_1 end_1 "
    "child_ranks child_counts open_1 open_2 order_1 order_2 begin_0 begin_1 "
    "children_0 children_1 list_count failing bounds at_levels places",
    "*i64": "positions head_mass",
    "*i8": "weights",
    "*fp16": "rank",
    "*fp32": "scales constants page_constants totals whole centre step spread partial partial_top "
    "partial_sum log_sums scores mean_bias longest unread missed residual bound_weights "
    "bound_reach",
}
TYPES = {name: kind for kind, names in POINTERS.items() for name in names.split()}
SHORT = {
    "float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "int64": "i64", "bool": "i1",
    "int32": "i32", "int8": "i8", "uint8": "u8", "float8_e4m3fn": "fp8e4nv",
}  # fmt: skip


def compiled(kernel: Any, spec: AttentionSpec, constants: dict[str, Any], capability: int) -> Any:
    """One kernel for NVIDIA GPUs of a compute capability, such as 80, with aligned operands."""
    import triton
    from triton.backends.compiler import GPUTarget

    own = dict.fromkeys(("query", "key", "value", "extra", "output"), f"*{SHORT[spec.dtype]}")
    own["centres"] = own["query"]
    own |= dict.fromkeys(
        (each for each in kernel.arg_names if each.startswith("summary_")), own["query"]
    )
    own["share"] = own["coverage"] = "fp32"
    own["axes"] = "*bf16" if spec.dtype == "bfloat16" else "*fp16"
    types = TYPES | own | {each.name: f"*{SHORT[each.dtype]}" for each in spec.captured}
    names = kernel.arg_names
    fixed = {name: constants[name] for name in names if name in constants}
    fixed |= {name: 1 for name in names if name.endswith("stride_d")}
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
    constexprs: dict[tuple[int, ...], Any] = {}
    for name, each in (("key", spec.keys), ("value", spec.values)):
        if each is not None and name in names:
            signature[name], ones = of_tensors(each)
            constexprs |= {(names.index(name), place): 1 for place in ones}
    aligned: dict[tuple[int, ...], Any] = {
        (names.index(name), place): [["tt.divisibility", 16]]
        for name, kinds in signature.items()
        if isinstance(kinds, tuple)
        for place, kind in enumerate(kinds)
        if kind != "constexpr"
    }
    source = triton.compiler.ASTSource(
        kernel,
        signature,
        constexprs=constexprs | {(names.index(name),): value for name, value in fixed.items()},
        attrs=aligned
        | {
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(names)
            if name not in fixed
            and isinstance(signature[name], str)
            and (types.get(name, "")[:1] == "*" or "stride" in name or name == "bin_room")
        },
    )
    options = {"num_warps": constants.get("WARPS", 4), "num_stages": 2}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    check_counts(made.asm["ttgir"], 32 * options["num_warps"])
    return made


def check_counts(code: str, threads: int) -> None:
    """Raise AssertionError if several threads have an item that counters in shared memory count."""
    blocked = r"(#\w+) = #ttg.blocked<{sizePerThread = \[\d+\], .*"
    layouts = set(re.findall(blocked, code))
    for line in code.splitlines():
        if "red.shared" in line:
            found = re.search(r": tensor<(\d+)xi32, (#\w+)> ->", line)
            assert found, line
            assert int(found[1]) >= threads, line
            assert found[2] in layouts, line


def of_tensors(load: LoadSpec) -> tuple[tuple[str, ...], list[int]]:
    """Return the type of an operand that is a tuple of tensors, and the places of strides of 1."""
    kinds: list[str] = []
    ones = []
    for each in load.tensors:
        rank = len(each.sizes)
        kinds += [f"*{SHORT[each.dtype]}", *["i32"] * rank]
        if rank:
            kinds[-1] = "constexpr"
            ones.append(len(kinds) - 1)
    return tuple(kinds), ones


def main(*names: str) -> None:
    """Compile the kernels of modules for a Hopper GPU, and attention for an Ampere GPU too.

    The argument "--hopper" leaves the Ampere GPU out.
    """
    ampere = "--hopper" not in names
    shared = {}
    for name in [each for each in names if each != "--hopper"]:
        spec = SPECS[name]
        module = load(store(emit_module(spec), spec.name).stem)
        for kernel, constants in (KERNELS if spec.tiles is None else TILE_KERNELS).items():
            if not hasattr(module, kernel):
                continue
            for capability in (80, 90) if ampere and "attend" in kernel else (90,):
                hopper = capability == 90
                listed = any(hasattr(module, f"list_{number}") for number in range(3))
                paged = hopper if hasattr(module, "scan_pages") else listed
                more = constants | {"EARLY": hopper, "PAGED": paged}
                made = compiled(getattr(module, kernel), spec, more, capability)
                shared[f"{name}.{kernel}.{capability}"] = made.metadata.shared
    sys.stdout.write(json.dumps(shared))


if __name__ == "__main__":
    main(*sys.argv[1:])
