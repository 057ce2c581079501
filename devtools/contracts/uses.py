"""What kernels use of other packages, and what the fakes of the tests declare.

What a kernel passes is read from its calls; this table says which name of which package a call goes to, and what stands
in its `**`. Of a kernel without a line here the names alone are compared (`Backend.symbols`), and its calls are listed
as not verifiable. A test checks that every line finds its calls.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "backends" / "kernels"
FAKES = ROOT / "tests" / "fakes"


QKV = ("q|query", "k|key", "v|value")
LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
BIAS = ("attn_bias", "compute_log_sumexp")
OPERATOR = ("query", "key", "value")


class Use(NamedTuple):
    """One name of a package, and the calls that go to it."""

    package: str
    name: str
    """`module:name`."""
    at: str = ""
    """`file:function:what is called there`, below backends/kernels, or below backends for a folder there; empty for a
    name that is not called."""
    also: tuple[str, ...] = ()
    """Arguments in the call's `**`."""
    asked: tuple[str, ...] = ()
    """Arguments that the kernel passes where the function has them: some release has to."""
    order: tuple[str, ...] = QKV
    """What positional arguments are called there, spellings with `|` between; any name will do for those beyond."""
    positional: int = 0
    """How many arguments are in the call's `*`."""
    when: str = ""
    """The versions for which the kernel uses it."""
    returns: tuple[int, ...] = ()
    """Return values that the kernel accepts: 1, a tuple's length, or several."""
    stands: str = ""
    """Where sources have its signature, if not under its name."""
    unread: str = ""
    """Why the source cannot show it: then a missing name is no difference."""
    calls_unread: str = ""
    """Why its calls are not read."""


class Call(NamedTuple):
    """What one line of the table passes, in all its calls."""

    positional: int
    keywords: frozenset[str]
    starred: bool
    """Whether the call has `**`."""


SECOND = ">=2"
WITHOUT_KERNEL = ("vsa", "st_attn")
"""Packages of sparse methods that run here without them: nothing of them is called, so there is nothing to compare."""
SDPA_PARAMS = (*OPERATOR, "attn_mask", "dropout", "is_causal", "enable_gqa")
IN_C = "registered by the compiled part"
NPU_META = "torch_npu.op_plugin.meta._meta_registrations:npu_fusion_attention_forward"
OPTIONS = ("qk_quant_gran", "pv_accum_dtype", "smooth_k")

USES = (
    *(
        use
        for package, module, when in (
            ("flash-attn", "flash_attn", ""),
            ("flash-attn-3", "flash_attn_interface", ""),
            ("flash-attn-4", "flash_attn.cute", ""),
            ("amd-aiter", "aiter", ""),
        )
        for use in (
            Use(package, f"{module}:flash_attn_func", "support/flash.py:load:flash_attn_func", when=when),
            *(
                ()
                if package == "amd-aiter"  # neither packed tokens nor a log-sum-exp of it
                else (
                    Use(
                        package,
                        f"{module}:flash_attn_varlen_func",
                        "support/flash.py:load_varlen:flash_attn_varlen_func",
                        asked=("max_seqlen_q", "max_seqlen_k"),
                    ),
                    Use(
                        package,
                        f"{module}:flash_attn_func",
                        "support/flash.py:load_lse:flash_attn_func",
                        asked=("return_lse",) if package == "flash-attn-4" else ("return_attn_probs",),
                        returns=(2, 3),
                    ),
                )
            ),
        )
    ),
    Use("sageattention", "sageattention:sageattn", "sage_attn.py:_first:sageattn", when="<2", returns=(1,)),
    Use("sageattention", "sageattention:sageattn", "sage_attn.py:_second:kernel", when=SECOND, returns=(1,)),
    Use(
        "sageattention",
        "sageattention:sageattn_varlen",
        "support/sage.py:load_varlen:sageattn_varlen",
        order=(*QKV, *LENGTHS),
        returns=(1,),
    ),
    Use(
        "sageattention",
        "sageattention:sageattn_qk_int8_pv_fp16_triton",
        "sage_fp16_triton.py:load:kernel",
        also=("smooth_k",),
        asked=("quantization_backend", "attn_mask"),
        when=SECOND,
        returns=(1,),
    ),
    *(
        Use(
            "sageattention",
            f"sageattention:{name}",
            "support/sage.py:kernel:function",
            also=options,
            when=SECOND,
            returns=(1,),
        )
        for name, options in (
            ("sageattn_qk_int8_pv_fp16_cuda", (*OPTIONS, "smooth_v")),
            ("sageattn_qk_int8_pv_fp8_cuda", (*OPTIONS, "smooth_v")),
            ("sageattn_qk_int8_pv_fp8_cuda_sm90", OPTIONS),
        )
    ),
    *(
        Use("sageattention", f"sageattention.core:{flag}", when=SECOND)
        for flag in ("SM80_ENABLED", "SM89_ENABLED", "SM90_ENABLED")
    ),
    Use("sageattn3", "sageattn3:sageattn3_blackwell", "sage_attn_3.py:load:sageattn3_blackwell", returns=(1,)),
    Use(
        "flashinfer-python",
        "flashinfer:single_prefill_with_kv_cache",
        "flashinfer_attn.py:load:single_prefill_with_kv_cache",
        returns=(1,),
    ),
    Use(
        "flashinfer-python",
        "flashinfer:packbits",
        "flashinfer_attn.py:packed_masks:packbits",
        order=("x",),
        returns=(1,),
    ),
    Use(
        "flashinfer-python",
        "flashinfer:BatchPrefillWithRaggedKVCacheWrapper",
        "flashinfer_attn.py:plans:BatchPrefillWithRaggedKVCacheWrapper",
        order=("float_workspace_buffer", "kv_layout"),
    ),
    Use(
        "flashinfer-python",
        "flashinfer:BatchPrefillWithRaggedKVCacheWrapper.plan",
        "flashinfer_attn.py:plan:wrapper.plan",
        order=("qo_indptr", "kv_indptr", "num_qo_heads", "num_kv_heads", "head_dim_qk"),
    ),
    Use(
        "flashinfer-python",
        "flashinfer:BatchPrefillWithRaggedKVCacheWrapper.run",
        "flashinfer_attn.py:load:wrapper.run",
        returns=(1,),
    ),
    Use(
        "flashinfer-python",
        "flashinfer:BatchPrefillWithRaggedKVCacheWrapper.run",
        "flashinfer_attn.py:load_lse:wrapper.run",
        returns=(2,),
    ),
    Use(
        "flashinfer-python",
        "flashinfer.prefill:trtllm_ragged_attention_deepseek",
        "trtllm_attn.py:load:attend",
        asked=("q_seq_lens_cpu", "kv_seq_lens_cpu"),
        returns=(1,),
    ),
    Use(
        "flashinfer-python",
        "flashinfer:BlockSparseAttentionWrapper",
        "sparse/executors/flashinfer.py:load:wrapper_class",
        order=("float_workspace_buffer",),
    ),
    Use(
        "flashinfer-python",
        "flashinfer:VariableBlockSparseAttentionWrapper",
        "sparse/executors/flashinfer.py:load:wrapper_class",
        order=("float_workspace_buffer",),
    ),
    Use(
        "flashinfer-python",
        "flashinfer:BlockSparseAttentionWrapper.plan",
        "sparse/executors/flashinfer.py:plan_pages:wrapper.plan",
        order=("indptr", "indices", "M", "N", "R", "C", "num_qo_heads", "num_kv_heads", "head_dim"),
    ),
    Use(
        "flashinfer-python",
        "flashinfer:VariableBlockSparseAttentionWrapper.plan",
        "sparse/executors/flashinfer.py:plan_lists:wrapper.plan",
        order=(
            *("block_mask_map", "block_row_sz", "block_col_sz"),
            *("num_qo_heads", "num_kv_heads", "head_dim"),
        ),
    ),
    Use(
        "flashinfer-python",
        "flashinfer:BlockSparseAttentionWrapper.run",
        "sparse/executors/flashinfer.py:load:plan.wrapper.run",
        returns=(1,),
    ),
    Use(
        "flashinfer-python",
        "flashinfer:VariableBlockSparseAttentionWrapper.run",
        "sparse/executors/flashinfer.py:_run_lists:wrapper.run",
        returns=(1,),
    ),
    Use(
        "fastvideo-kernel",
        "fastvideo_kernel:block_sparse_attn",
        "sparse/executors/fastvideo.py:load:block_sparse_attn",
        order=(*QKV, "block_map", "variable_block_sizes"),
        returns=(2,),
    ),
    Use(
        "spas-sage-attn",
        "spas_sage_attn:block_sparse_sage2_attn_cuda",
        "sparse/executors/spas_sage.py:load:block_sparse_sage2_attn_cuda",
        returns=(1,),
    ),
    Use(
        "flash-attn-4",
        "flash_attn.cute:flash_attn_func",
        "sparse/executors/fa4.py:load:flash_attn_func",
        when=">=4.0.0b33",
        returns=(2,),
    ),
    Use(
        "flash-attn-4",
        "flash_attn.cute.block_sparsity:BlockSparseTensorsTorch",
        "sparse/executors/fa4.py:load:BlockSparseTensorsTorch",
        when=">=4.0.0b33",
    ),
    Use("xformers", "xformers.ops:memory_efficient_attention", "xformers.py:load:attention", returns=(1,)),
    Use(
        "xformers",
        "xformers.ops:memory_efficient_attention_forward_requires_grad",
        "xformers.py:load_lse:attention",
        returns=(2,),
    ),
    Use("xformers", "xformers.ops:LowerTriangularMask", "xformers.py:load:causal"),
    Use("xformers", "xformers.ops:fmha.flash.FwOp.is_available", "xformers.py:_imported:operator.is_available"),
    Use("xformers", "xformers.ops:fmha.cutlass.FwOp.is_available", "xformers.py:_imported:operator.is_available"),
    Use("xformers", "xformers.ops:fmha.flash.FwOp.NAME"),
    Use("xformers", "xformers.ops:fmha.cutlass.FwOp.NAME"),
    Use("xformers", "xformers._cpp_lib:_built_with_cuda"),
    Use("xformers", "xformers._cpp_lib:_cpp_library_load_exception"),
    Use(
        "comfy-kitchen",
        "comfy_kitchen:int8_attention",
        "comfy_kitchen_int8.py:load:int8_attention",
        returns=(1,),
    ),
    Use(
        "comfy-kitchen",
        "comfy_kitchen:int8_attention_is_available",
        "comfy_kitchen_int8.py:load:int8_attention_is_available",
    ),
    Use(
        "comfy-kitchen",
        "comfy_kitchen:prequantize_int8_attention",
        "comfy_kitchen_int8.py:load:prequantize",
        asked=("prequantize_int8_attention",),
    ),
    Use(
        "comfy-kitchen",
        "comfy_kitchen:int8_attention_from_prequantized",
        "comfy_kitchen_int8.py:load:comfy_kitchen.int8_attention_from_prequantized",
        asked=("int8_attention_from_prequantized",),
        order=(),
    ),
    Use(
        "torch-npu",
        "torch_npu:npu_fusion_attention",
        "npu_fusion.py:load:npu_fusion_attention",
        order=(*OPERATOR, "head_num", "input_layout"),
        returns=(7,),
        stands=NPU_META,
        unread=IN_C,
    ),
    Use(
        "torch-xla",
        "torch_xla.experimental.custom_kernel:flash_attention",
        "xla_flash.py:load:flash_attention",
        asked=("sm_scale", "q_segment_ids", "kv_segment_ids"),
        returns=(1,),
    ),
    Use("torch-xla", "torch_xla.runtime:device_type", "xla_flash.py:load:runtime.device_type"),
    Use("kernels", "kernels:get_kernel", "support/hub.py:load:get_kernel", order=("repo_id",)),
    Use("torch", "torch.nn.functional:scaled_dot_product_attention"),
    Use("torch", "torch:scaled_dot_product_attention", "support/sdpa.py:plain_sdpa:sdpa", returns=(1,)),
    *(
        Use(
            "torch",
            f"torch:_scaled_dot_product_{name}",
            f"support/sdpa.py:{function}:operator",
            order=(*OPERATOR, *order),
            returns=returns,
        )
        for name, function, order, returns in (
            ("attention_math", "_math", ("attn_mask", "dropout_p", "is_causal"), (2,)),
            ("flash_attention_for_cpu", "_flash_on_cpu", ("dropout_p", "is_causal"), (2,)),
            ("flash_attention", "_flash", ("dropout_p", "is_causal", "return_debug_mask"), (9,)),
            ("efficient_attention", "_efficient", (*BIAS, "dropout_p", "is_causal"), (4,)),
            ("cudnn_attention", "_cudnn", (*BIAS, "dropout_p", "is_causal", "return_debug_mask"), (9,)),
        )
    ),
    Use("torch", "torch._C:_SDPAParams", "support/sdpa.py:facts_for_torch:SDPAParams", order=SDPA_PARAMS),
    Use("torch", "torch.backends.cuda:SDPAParams"),
    *(
        Use(
            "torch",
            f"torch.backends.cuda:can_use_{name}_attention",
            "support/sdpa.py:pinned:can_use",
            order=("params",),
            returns=(1,),
        )
        for name in ("flash", "cudnn", "efficient")
    ),
    *(
        Use("torch", f"torch.backends.cuda:{name}_sdp_enabled", "support/sdpa.py:pinned:enabled")
        for name in ("flash", "cudnn", "mem_efficient")
    ),
    Use("torch", "torch.nn.attention:sdpa_kernel", asked=("set_priority",)),
    Use(
        "torch",
        "torch.nn.attention.flex_attention:flex_attention",
        "flex_attn.py:attend:flex_attention",
        returns=(1,),
    ),
    Use(
        "torch",
        "torch.nn.attention.flex_attention:BlockMask.from_kv_blocks",
        "support/flex_blocks.py:block_mask:BlockMask.from_kv_blocks",
        asked=("seq_lengths",),
        order=("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"),
        positional=4,
    ),
    Use(
        "torch",
        "torch.nn.attention.varlen:varlen_attn",
        "sdpa_flash.py:load_varlen:varlen_attn",
        asked=("scale", "enable_gqa"),
        order=(*OPERATOR, "cu_seq_q", "cu_seq_k", "max_q", "max_k"),
        when=">=2.10",
        returns=(1,),
    ),
)

FLOORS = {"torch": ">=2.5", "kernels": ">=0.15"}
"""What kernels take of packages that no kernel declares as its own; of the others it stands in `Backend.requires`."""


class Gate(NamedTuple):
    """The version from which on a name must exist, and before which it must not."""

    package: str
    version: str
    name: str
    parameter: str = ""


GATES = (
    Gate("comfy-kitchen", "0.2.29", "comfy_kitchen:int8_attention"),
    Gate("kernels", "0.14", "kernels:get_kernel", "trust_remote_code"),
    Gate("torch-xla", "2.4", "torch_xla.experimental.custom_kernel:flash_attention", "q_segment_ids"),
    Gate("torch", "2.10", "torch.nn.attention.varlen:varlen_attn"),
    Gate("torch", "2.11", "torch.nn.attention.varlen:varlen_attn", "scale"),
    Gate("torch", "2.12", "torch.nn.attention.varlen:varlen_attn", "enable_gqa"),
    Gate("torch", "2.6", "torch.nn.attention:sdpa_kernel", "set_priority"),
)


class Fake(NamedTuple):
    """A module of tests/fakes and the package that it imitates."""

    file: str
    package: str
    module: str
    when: str = ""
    renamed: tuple[tuple[str, str, str], ...] = ()
    """Its functions that are called otherwise there, or that are so in some versions: here, there, versions; `-` for
    those that are none of the package's."""
    unread: str = ""


FAKE_MODULES = (
    Fake("flash_attn_2", "flash-attn", "flash_attn"),
    Fake("flash_attn_3", "flash-attn-3", "flash_attn_interface"),
    Fake("flash_attn_4", "flash-attn-4", "flash_attn.cute"),
    Fake("amd_aiter", "amd-aiter", "aiter"),
    Fake("sageattention_1", "sageattention", "sageattention", "<2"),
    Fake("sageattention_2", "sageattention", "sageattention", SECOND),
    Fake("sageattn3", "sageattn3", "sageattn3"),
    Fake(
        "flashinfer",
        "flashinfer-python",
        "flashinfer",
        renamed=(("trtllm_ragged_attention_deepseek", "flashinfer.prefill:trtllm_ragged_attention_deepseek", ""),),
    ),
    Fake("xformers", "xformers", "xformers.ops", renamed=(("modules", "-", ""),)),
    Fake("comfy_kitchen", "comfy-kitchen", "comfy_kitchen"),
    Fake("torch_npu", "torch-npu", "torch_npu", renamed=(("npu_fusion_attention", NPU_META, ""),), unread=IN_C),
    Fake(
        "torch_xla",
        "torch-xla",
        "torch_xla.experimental.custom_kernel",
        renamed=(
            ("modules", "-", ""),
            ("flash_attention", "torch_xla.experimental.custom_kernel:flash_attention", ">=2.4"),
            ("first_flash_attention", "torch_xla.experimental.custom_kernel:flash_attention", "<2.4"),
        ),
    ),
    Fake("hub", "kernels", "kernels"),
    Fake(
        "torch_varlen",
        "torch",
        "torch.nn.attention.varlen",
        ">=2.10",
        renamed=(
            ("module", "-", ""),
            ("varlen_attn", "torch.nn.attention.varlen:varlen_attn", ">=2.12"),
            ("first_varlen_attn", "torch.nn.attention.varlen:varlen_attn", "<2.11"),
        ),
    ),
)


NO_LINE = "no line in devtools/contracts/uses.py"


def all_uses(declared: Iterable[tuple[str, str, str]]) -> list[Use]:
    """The table, and a line for each declared name that it does not have: package, `module:name` and versions."""
    known = {use.name for use in USES}
    others = dict.fromkeys(one for one in declared if one[1] not in known)
    return [*USES, *(Use(package, name, when=when, calls_unread=NO_LINE) for package, name, when in others)]


def all_fakes(modules: Iterable[tuple[str, str]]) -> list[Fake]:
    """The list of fakes, and those that are called as the module of a package: package and module."""
    known = {fake.file for fake in FAKE_MODULES}
    others = [(package, module) for package, module in dict.fromkeys(modules) if module not in known]
    found = [Fake(module, package, module) for package, module in others if (FAKES / f"{module}.py").is_file()]
    return [*FAKE_MODULES, *found]


def fake_functions(fake: Fake, source: str) -> list[tuple[str, str, str]]:
    """What a fake declares: the name here, `module:name` there, and the versions. Public functions and methods."""
    renamed = {here: (there, when) for here, there, when in fake.renamed}
    found = []
    for node in ast.parse(source).body:
        methods = [one for one in getattr(node, "body", []) if isinstance(one, ast.FunctionDef)]
        if isinstance(node, ast.FunctionDef):
            names = [node.name]
        elif isinstance(node, ast.ClassDef):
            public = [one.name for one in methods if not one.name.startswith("_") or one.name == "__init__"]
            names = [node.name if name == "__init__" else f"{node.name}.{name}" for name in public]
        else:
            continue
        for name in names:
            there, when = renamed.get(name, (f"{fake.module}:{name}", ""))
            if not name.startswith("_") and there != "-":
                found.append((name, there, when))
    return found


def call_of(use: Use) -> Call | None:
    """All calls of a line of the table together; None where its file has none."""
    file, function, called = use.at.split(":")
    found = [
        node
        for outer in ast.walk(_parsed(file))
        if isinstance(outer, ast.FunctionDef) and outer.name == function
        for node in ast.walk(outer)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == called
    ]
    if not found:
        return None
    longest = max(sum(not isinstance(one, ast.Starred) for one in call.args) for call in found)
    keywords = {keyword.arg for call in found for keyword in call.keywords if keyword.arg is not None}
    starred = any(keyword.arg is None for call in found for keyword in call.keywords)
    return Call(longest + use.positional, frozenset(keywords | set(use.also)), starred)


@cache
def _parsed(file: str) -> ast.Module:
    path = KERNELS / file
    return ast.parse((path if path.exists() else KERNELS.parent / file).read_text(encoding="utf-8"))
