"""Do vLLM's Triton kernels compile for a T4, and do they fit into it? Told on any machine, without a GPU.

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_31_x86_64 vllm==0.19.1 -d wheels
    pip install --no-deps --target triton-3.6 triton==3.6.0     # what torch 2.10.0 comes with
    python -m benchmarks.t4_kernels --vllm wheels/vllm-*.whl --triton triton-3.6 [--capability 75]

Attention and LoRA of the profile `kaggle-t4` are Triton's, whose makers do not support sm_75 any more (triton issue 10918). Each
kernel is compiled as vLLM launches it for SmolLM2-135M and Qwen2.5-0.5B with a LoRA of rank 32 in float16, down to machine code by the
ptxas that Triton brings. Printed are the shared memory of a block, which must not pass what the device has (a T4: 64 KiB), registers,
bytes that spill out of them, and whether products use tensor cores (mma) or not (fma). Tiles are those of vLLM's
get_lora_op_configs and unified_attention, and ours (arc_kernel/lora_tiles); kernels that a release does not have are left out with a word.
"""

import argparse
import ast
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SHARED = {75: 64 << 10}  # bytes a block may have, where it is known here
HEADER = "import triton\nimport triton.language as tl\n\n\nclass float8_info:\n    min, max = -448.0, 448.0\n"
FILES = ("lora/ops/triton_ops/kernel_utils.py", "lora_shrink_op.py", "lora_expand_op.py", "ops/triton_unified_attention.py",
         "ops/triton_reshape_and_cache_flash.py", "v1/sample/ops/topk_topp_triton.py", "v1/worker/block_table.py")
HALF, FLOAT, LONG, INT = "*fp16", "*fp32", "i64", "*i32"
TYPES = {  # of what is neither a constant nor a 32-bit integer
    "input_ptr": HALF, "token_indices_sorted_by_lora_ids": INT, "num_tokens_per_lora": INT, "lora_token_start_loc": INT, "lora_ids": INT,
    "scaling": "fp32", "output_ptr": HALF, "query_ptr": HALF, "key_ptr": HALF, "value_ptr": HALF, "key_cache_ptr": HALF,
    "value_cache_ptr": HALF, "slot_mapping_ptr": "*i64", "block_tables_ptr": INT, "seq_lens_ptr": INT, "query_start_len_ptr": INT,
    "scale": "fp32", "k_scale": FLOAT, "v_scale": FLOAT, "out_scale": "fp32", "out_scale_inv": "fp32", "softcap": "fp32",
    "segm_output_ptr": FLOAT, "segm_max_ptr": FLOAT, "segm_expsum_ptr": FLOAT, "block_table_stride": LONG, "query_stride_0": LONG,
    "query_stride_1": LONG, "output_stride_0": LONG, "output_stride_1": LONG, "qq_bias_stride_0": LONG, "stride_k_cache_0": LONG,
    "stride_k_cache_1": LONG, "stride_k_cache_2": LONG, "stride_v_cache_0": LONG, "stride_v_cache_1": LONG, "stride_v_cache_2": LONG,
    "key_stride": LONG, "value_stride": LONG, "block_stride": LONG, "head_stride": LONG, "page_stride": LONG}
ODD = ("M", "num_seqs", "num_tokens", "max_num_tokens", "BATCH_SIZE", "qq_bias_stride_0", "slice_start_loc", "ls_d0_ptr",
       "ls_d1_ptr")  # integers that need not be multiples of 16


def kernels(wheel: Path, folder: Path):
    """A module with all functions under `triton.jit` of FILES, as the wheel has them."""
    text = HEADER
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(n for n in archive.namelist() if n.endswith(FILES)):
            source = archive.read(name).decode()
            for node in ast.parse(source).body:
                if isinstance(node, ast.FunctionDef) and [ast.unparse(d) for d in node.decorator_list] == ["triton.jit"]:
                    text += f"\n\n@triton.jit\n{ast.get_source_segment(source, node)}\n"
    (folder / "vllm_kernels.py").write_text(text)
    sys.path.insert(0, str(folder))
    import vllm_kernels

    return vllm_kernels


def lora_launches():
    """(kernel, label, types, constants, warps, stages) of vLLM's LoRA products; slices are q, k and v, gate and up, or one layer."""
    always = dict(USE_GDC=False, launch_pdl=False)
    shrink = always | dict(BLOCK_M=32, BLOCK_N=16, GROUP_SIZE_M=8, input_d1_stride=1, lora_d2_stride=1, output_d2_stride=1)
    expand = always | dict(EVEN_K=True, ADD_INPUTS=True, CAST_TYPE=True, input_d2_stride=1, output_d1_stride=1)
    for slices in (1, 2, 3):
        weights = {"lora_ptr": HALF if slices == 1 else "*u64"}
        for tokens, wide, split in (("fewer than", 256, 64), ("from", 32, 8)):  # the latter are ours at any number
            for inputs in (576, 1536):
                tiles = dict(BLOCK_K=wide, SPLIT_K=split, EVEN_K=inputs % (wide * split) == 0, SLICE_NUM=slices)
                label = f"{slices} x {inputs} wide, {tokens} 128 tokens"
                yield "_lora_shrink_kernel", label, weights | {"out_ptr": FLOAT}, shrink | tiles, 4, 2
        alike = slices < 3  # q is wider than k and v
        places = dict.fromkeys(("slice_start_loc", "output_hs_ptr"), "*i64") if slices > 1 else {}
        places |= {} if alike else dict.fromkeys(("ls_d0_ptr", "ls_d1_ptr", "ls_d2_ptr"), "*i64")
        for whose, rows, wide, deep in (("0.19.1's", 64, 128 if slices == 1 else 64, 32), ("0.11.2's", 64, 128, 16), ("our", 32, 64, 32)):
            tiles = dict(BLOCK_M=rows, BLOCK_N=wide, BLOCK_K=deep, SLICE_NUM=slices, SAME_STRIDE=alike)
            tiles |= {"ls_d2_ptr": 1} if alike else {}
            label = f"{slices} layers, {whose} tiles of {rows} x {wide} x {deep}"
            yield "_lora_expand_kernel", label, weights | {"out_ptr": HALF, "input_ptr": FLOAT} | places, expand | tiles, 4, 2


def attention_launches(capability: int):
    """The same of its attention: prefill and large batches (2d), few answers (3d and reduce), and what fills the cache."""
    none = dict.fromkeys(("sink_ptr", "alibi_slopes_ptr", "qq_bias_ptr", "mm_prefix_range_ptr"))
    off = ("USE_ALIBI_SLOPES", "USE_ALIBI_SQRT", "USE_QQ_BIAS", "USE_SOFTCAP", "USE_SINKS", "USE_MM_PREFIX", "USE_FP8")
    paged = none | dict.fromkeys(off, False) | dict(BLOCK_SIZE=16, HEAD_SIZE=64, HEAD_SIZE_PADDED=64, BLOCK_M=16, SLIDING_WINDOW=0,
                                                    MAX_MM_RANGES=0, stride_k_cache_3=1, stride_v_cache_3=1, FP8_MIN=-448.0, FP8_MAX=448.0)
    written = dict(head_size=64, block_size=16, x=1, dim_stride_k=1, dim_stride_v=1, USE_HEAD_MAJOR_LAYOUT=False, FP8_KV_CACHE=False)
    for model, heads, keys in (("SmolLM2-135M", 9, 3), ("Qwen2.5-0.5B", 14, 2)):
        shape = paged | dict(num_query_heads=heads, num_queries_per_kv=heads // keys, BLOCK_Q=16 // (heads // keys))
        decode = shape | {"TILE_SIZE": 16, "NUM_SEGMENTS_PER_SEQ": 16}
        yield "kernel_unified_attention_2d", model, {}, shape | {"TILE_SIZE": 32}, 4, 3
        yield "kernel_unified_attention_3d", model, {}, decode, 4, 3
        yield "reduce_segments", model, {}, decode, 4, 3
        tile = min(512 if capability < 90 else 2048, 1 << (keys * 64 - 1).bit_length())
        yield "reshape_and_cache_kernel_flash", model, {}, written | dict(num_heads=keys, TILE_SIZE=tile), 16, 3


def start_launches():
    """The same of a token's place in the cache, and of top-k and top-p, which nothing here asks for and vLLM tries at its start."""
    places = dict(query_start_loc_ptr=INT, positions_ptr="*i64", block_table_ptr=INT, slot_mapping_ptr="*i64", block_table_stride="i32")
    one = dict(TOTAL_CP_WORLD_SIZE=1, TOTAL_CP_RANK=0, CP_KV_CACHE_INTERLEAVE_SIZE=1, PAD_ID=-1, BLOCK_SIZE=1024)
    yield "_compute_slot_mapping_kernel", "any model", places, one, 4, 3
    tables = dict.fromkeys(("LOGITS", "BUFFER", "PERCENTILE_TO_STD_TABLE", "NORMAL_CDF_TO_SIGMA_TABLE", "P"), FLOAT) | {"K": INT}
    for tokens in (389, 49_152, 151_936):
        both = dict(VOCAB_SIZE=tokens, MASK_VALUE=float("-inf"), BLOCK_SIZE=8192, BLOCK_SIZE_TRUNC=4096)
        yield "_topk_topp_kernel", f"vocabulary of {tokens:,}", tables, both | dict(TOPK_ENABLED=True, TOPP_ENABLED=True), 4, 3


def compiled(kernel, types: dict, constants: dict, warps: int, stages: int, capability: int) -> tuple[int, str]:
    """Shared memory of a block (bytes), and in words its registers, spilled bytes and kind of products."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, names = TYPES | types, kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names)
               if signature[n] not in ("constexpr", "fp32") and (signature[n][0] == "*" or n not in ODD)}
    source = ASTSource(kernel, signature, {(i,): constants[n] for i, n in enumerate(names) if n in constants}, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages})
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        command = [ptxas, "-v", f"--gpu-name=sm_{capability}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = (re.search(pattern, said)[1] for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
    products = "mma" if "mma.sync" in made.asm["ptx"] else "fma"
    return made.metadata.shared, f"{registers} registers, {spilled} bytes spilled by a thread, {products}"


def main() -> None:
    """Print a line for each kernel; end with 1 where one does not compile or fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, required=True, help="a wheel of vLLM, any platform's")
    parser.add_argument("--triton", type=Path, required=True, help="folder into which the Triton of its torch was installed")
    parser.add_argument("--capability", type=int, default=75, help="of the GPU: 75 is a T4")
    options = parser.parse_args()
    for path in (options.vllm, options.triton / "triton"):
        if not path.exists():
            parser.error(f"{path}: no such file: see --help for where it comes from")
    sys.path.insert(0, str(options.triton))
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        found = kernels(options.vllm, Path(folder))
        for name, label, types, constants, warps, stages in [*lora_launches(), *attention_launches(options.capability),
                                                             *start_launches()]:
            kernel = getattr(found, name, None)
            if kernel is None:
                print(f"{name}: not in {options.vllm.name}")
                continue
            try:
                shared, said = compiled(kernel, types, constants, warps, stages, options.capability)
                fits = shared <= SHARED.get(options.capability, shared)
                wrong += not fits
                print(f"{name}, {label}: {shared:,} bytes shared{'' if fits else ', which do not fit'}, {said}", flush=True)
            except Exception as error:  # whatever a compiler raises is what is asked for
                wrong += 1
                print(f"{name}, {label}: does not compile: {type(error).__name__}: {str(error)[:300]}", flush=True)
    sys.exit(min(wrong, 1))


if __name__ == "__main__":
    main()
