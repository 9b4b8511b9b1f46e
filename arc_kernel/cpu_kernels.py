"""C functions for training on a CPU with avx512_bf16 (`c/`): attention, products with frozen weights in 8 bits, a LoRA's, norm, rotary and
SwiGLU, and of these a decoder layer from end to end. The machine's own compiler compiles them, in two seconds, once; they are kept beside
converted models. Where there is no compiler, or another CPU, training does without. They fill the processor where torch's operators wait
for memory, for their weights to be put in order and for Python: a step takes half of the seconds (benchmarks/LOG.md).

Their threads are those of torch: its library of OpenMP, which it loads for all, is what they are linked to at load. A second one would have
threads of its own, which wait spinning on the cores of the first.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import torch

from .errors import ArcKernelError, named_line
from .files import check_cache, replacing

SOURCES = Path(__file__).parent / "c"
COMPILERS = "gcc", "cc"  # clang's OpenMP is not the one that torch comes with
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-fopenmp", "-mfma", *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "bf16", "vnni")))
LANES, BLOCK, WIDEST = 16, 64, 256  # numbers in a register, tokens in a block of attention, its widest head: as in `c/`
PATIENCE = 60  # seconds for a compiler that takes one
KINDS = {"p": ctypes.c_void_p, "l": ctypes.c_long, "f": ctypes.c_float, "i": ctypes.c_int}
ELEMENTWISE = {"norm": "ppfpppll", "norm_back": "ppppppll", "rotate": "pllppipllll", "rotate_back": "pppppiplllll", "swiglu": "ppll",
               "swiglu_back": "ppppll"}  # what each function takes, before the number of threads
WITH_ROOM = {"attention_forward": "ppppppfl", "attention_backward": "ppppppppppf", "lora_forward": "pppppl", "lora_to_input": "ppppl",
             "lora_to_masters": "ppppppl", "frozen_forward": "ppppppl", "frozen_to_input": "pppppl", "layer_forward": "pppppppillpl",
             "layer_backward": "ppppippillpl"}  # those that give back whether they found no memory


class _Heads(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_long) for name in ("batch", "head", "token"))]


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("batch", "heads", "keys", "tokens", "width")]


class _Layer(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in ("a", "b", "of_a", "of_b")),
                *((name, ctypes.c_long) for name in ("rank", "outputs", "ranks_before", "outputs_before")), ("scale", ctypes.c_float)]


class _Group(ctypes.Structure):
    _fields_ = [("layers", ctypes.POINTER(_Layer)), *((name, ctypes.c_long) for name in ("many", "inputs", "outputs", "ranks"))]


class _Frozen(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("words", "scales", "factors", "bias")]


class _DecoderLayer(ctypes.Structure):
    _fields_ = [("groups", ctypes.POINTER(_Group) * 4), ("there", _Frozen * 4), ("back", _Frozen * 4), ("norms", ctypes.c_void_p * 2),
                ("eps", ctypes.c_float * 2), ("scaling", ctypes.c_float), *((name, ctypes.c_long) for name in ("heads", "keys", "width"))]


@functools.cache
def refused() -> str:
    """Why these functions cannot be used here, in one line; empty where they can."""
    if not _suited():
        return "this CPU lacks avx512_bf16 or avx512_vnni"
    try:
        _library()
    except ArcKernelError as error:
        return str(error)
    except (OSError, subprocess.SubprocessError) as error:
        return named_line(error)
    return ""


def _suited() -> bool:
    return torch.cpu._is_avx512_bf16_supported() and torch.cpu._is_vnni_supported()


def missing() -> str:
    """What to say of a CPU that could be used better; empty where there is nothing to say."""
    slow = _suited() and refused()
    return f"training on this CPU takes longer than it could: {slow}" if slow else ""


@functools.cache
def _library() -> ctypes.CDLL:
    files = sorted(file for file in SOURCES.iterdir() if file.suffix in (".c", ".h"))
    digest = hashlib.sha256(" ".join(FLAGS).encode() + b"".join(file.read_bytes() for file in files)).hexdigest()
    made = check_cache() / "kernels" / f"{digest[:16]}.so"
    library = _opened(made)
    if library is None:
        _compile([file for file in files if file.suffix == ".c"], made)
        library = ctypes.CDLL(str(made))
    for name, takes in (ELEMENTWISE | WITH_ROOM).items():
        function = getattr(library, name)
        function.argtypes, function.restype = [KINDS[kind] for kind in takes + "i"], ctypes.c_int if name in WITH_ROOM else None
    for function in (library.kept_bytes, library.scratch_bytes):
        function.argtypes, function.restype = [KINDS[kind] for kind in "pll"], ctypes.c_long
    return library


def _opened(made: Path) -> ctypes.CDLL | None:
    """What was compiled before, where it is there, for this machine, this user's (another's is not run), and whole: of one that was cut off
    the first use of what is missing would end the process."""
    with contextlib.suppress(OSError, struct.error):
        if made.stat().st_uid == os.geteuid():
            head = made.read_bytes()
            start, each, count = *struct.unpack_from("<Q", head, 40), *struct.unpack_from("<HH", head, 58)
            if start + each * count <= len(head):  # of ELF's table of sections, which comes last
                return ctypes.CDLL(str(made))
    return None


def _compile(sources: list[Path], made: Path) -> None:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise ArcKernelError(f"there is no C compiler ({' or '.join(COMPILERS)}): install gcc")
    with tempfile.TemporaryDirectory() as folder:
        objects = {str(file): str(Path(folder) / f"{file.stem}.o") for file in sources}
        shared = Path(folder) / made.name
        _carry_out(*([compiler, *FLAGS, "-c", source, "-o", name] for source, name in objects.items()))
        _carry_out([compiler, "-shared", "-Wl,-Bsymbolic", *objects.values(), "-o", str(shared), "-lm"])
        with replacing(made, "wb") as file:
            file.write(shared.read_bytes())


def _carry_out(*commands: list[str]) -> None:
    """Run these at once; raises ArcKernelError where one fails, with what it said."""
    running = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace") for c in commands]
    try:
        for process in running:
            said = process.communicate(timeout=PATIENCE)[1]
            if process.returncode:
                line = next((line for line in said.splitlines() if "error" in line), f"code {process.returncode}")
                raise ArcKernelError(f"{process.args[0]}: {line.strip()}")
    finally:
        for process in running:
            with process:  # waits for it, and closes what it said
                process.kill()


def takes(width: int) -> bool:
    """Whether there is attention for heads of this width."""
    return width % LANES == 0 and width <= WIDEST


def attention(q, k, v, scaling: float, out=None):
    """Causal attention of q [B, n, T, width] over k and v [B, m, T, width], or more of them, that begin before the first query; n a
    multiple of m, bfloat16 of a width that it `takes`: in `out`, or the same shape as q, in memory [B, T, n, width]; and what the gradient
    needs, float32 [B, n, T rounded up to 64]."""
    q, k, v = map(_lined_up, (q, k, v))
    out, levels = _empty_heads(q) if out is None else out, _float32(*q.shape[:2], -(-q.shape[2] // BLOCK) * BLOCK)
    _run("attention_forward", *map(_heads, (q, k, v, out)), levels.data_ptr(), _shape(q, k), scaling, k.shape[2] - q.shape[2])
    return out, levels


def attention_back(q, k, v, out, levels, grad, scaling: float):
    """The gradients to q, k and v from that to `out`, which `attention` gave with `levels`."""
    given, made = list(map(_lined_up, (q, k, v, out, grad))), [_empty_heads(x) for x in (q, k, v)]
    _run("attention_backward", *map(_heads, given), levels.data_ptr(), *map(_heads, made), _shape(q, k), scaling)
    return made


def multiplies(weight) -> bool:
    """Whether there are products in 8 bits with this weight [out, in], and a LoRA's beside it. Not with AMX, which torch's library
    multiplies with and these do not: there they were not tried."""
    return (weight.dtype == torch.bfloat16 and weight.is_cpu and not refused() and not torch.cpu._is_amx_tile_supported()
            and all(side % LANES == 0 for side in weight.shape))


class Frozen:
    """Products with a weight that stays as it is, in 8 bits: int8 [out, in], its outputs' scales float32 [out], and a `factor` bfloat16
    [in], where there is one, with which inputs are multiplied before they are rounded, row by row."""

    def __init__(self, weight, scales, factor=None):
        outputs, inputs = self.sides = weight.shape
        words = weight.new_zeros(outputs // LANES, inputs // 4 | 1, LANES, 4, dtype=torch.uint8)  # as in `c/frozen.c`; sums modulo 256
        words[:, :inputs // 4] = (weight.view(outputs // LANES, LANES, inputs // 4, 4).transpose(1, 2) + 128).to(torch.uint8)
        self._kept = words, scales, factor
        self.struct = _Frozen(*map(_at, self._kept))

    def __call__(self, x):
        """x [T, in] times the weight's transpose: [T, out], bfloat16 both."""
        outputs, inputs = self.sides
        x, y, alone = x.contiguous(), x.new_empty(x.shape[0], outputs), _Group(None, 0, outputs, inputs, 0)
        _run("frozen_to_input", x.data_ptr(), ctypes.byref(alone), ctypes.byref(self.struct), None, y.data_ptr(), x.shape[0])
        return y


class Lora:
    """The products of LoRA layers that read the same input, A [rank, in] and B [outputs, rank] each, in bfloat16. `masters` below are A and
    B of one after the other."""

    def __init__(self, inputs: int, outputs: list[int], ranks: list[int]):
        self.ranks, self._layers = sum(ranks), (_Layer * len(ranks))()
        self._group = _Group(self._layers, len(ranks), inputs, sum(outputs), self.ranks)
        self._given = None
        for number, layer in enumerate(self._layers):
            layer.rank, layer.ranks_before = ranks[number], sum(ranks[:number])
            layer.outputs, layer.outputs_before = outputs[number], sum(outputs[:number])

    @staticmethod
    def fits(weight, outputs: list[int], ranks: list[int]) -> bool:
        """Whether there is this for layers of so many outputs and such ranks whose frozen weights are rows of `weight` [out, in]."""
        return multiplies(weight) and all(side % LANES == 0 for side in (*outputs, *ranks))

    def bind(self, masters, scales, sums):
        """Itself as C takes it, with these from now on."""
        self._add_to(sums)
        self._of(masters, scales)
        return self._group

    def forward(self, x, y, masters, scales, residual=None, frozen: Frozen | None = None):
        """Adds to y [T, out] what the layers add to it for x [T, in], and the `residual` [T, out]; with `frozen` y is made, its product
        with them. Gives back h [T, ranks], x A' of all, scaled."""
        if x.dtype != y.dtype:
            raise TypeError(f"{x.dtype} is multiplied with weights in {y.dtype}")
        x, h, beside = x.contiguous(), x.new_empty(x.shape[0], self.ranks), None if residual is None else residual.contiguous()
        name, given = ("frozen_forward", [ctypes.byref(frozen.struct)]) if frozen else ("lora_forward", [])
        _run(name, x.data_ptr(), self._of(masters, scales), *given, h.data_ptr(), y.data_ptr(), _at(beside), x.shape[0])
        return h

    def to_input(self, grad, to_x, masters, scales, frozen: Frozen | None = None):
        """The gradient to h from that to y, `grad`; and to_x [T, in], where it is there, has what h adds to the gradient to x added; with
        `frozen`, the transpose, it is made, its product with them."""
        grad, to_h = grad.contiguous(), grad.new_empty(grad.shape[0], self.ranks)
        name, given = ("frozen_to_input", [ctypes.byref(frozen.struct)]) if frozen and to_x is not None else ("lora_to_input", [])
        _run(name, grad.data_ptr(), self._of(masters, scales), *given, to_h.data_ptr(), _at(to_x), grad.shape[0])
        return to_h

    def to_masters(self, grad, to_h, x, factor, h, masters, scales, sums) -> None:
        """Adds the gradients to the masters to `sums`, float32; with `factor` [in] the layers' input was x times that."""
        grad, x, factor = grad.contiguous(), x.contiguous(), None if factor is None else factor.to(x.dtype)
        self._add_to(sums)
        _run("lora_to_masters", grad.data_ptr(), to_h.data_ptr(), x.data_ptr(), _at(factor), h.data_ptr(), self._of(masters, scales),
             x.shape[0])

    def _add_to(self, sums) -> None:
        for layer, of_a, of_b in zip(self._layers, sums[0::2], sums[1::2]):
            layer.of_a, layer.of_b = of_a.data_ptr(), of_b.data_ptr()

    def _of(self, masters, scales):
        given = [m.data_ptr() for m in masters], scales
        if given != self._given:
            self._given = given
            for number, layer in enumerate(self._layers):
                layer.a, layer.b = given[0][2 * number:2 * number + 2]
                layer.scale = scales[number]
        return ctypes.byref(self._group)


class DecoderLayer:
    """A layer of the Llama family, all of it: of q, k and v, of attention's output, of gate and up, and of down the LoRA, `bind`ed, its
    weight and the transpose, and a bias or None; of both norms weight and eps."""

    def __init__(self, groups: list[tuple[_Group, Frozen, Frozen, torch.Tensor | None]], norms: list, scaling: float, heads: int, keys: int,
                 width: int):
        self._kept = groups, norms  # what is pointed to
        self._struct = _DecoderLayer(scaling=scaling, heads=heads, keys=keys, width=width)
        for number, (group, there, back, bias) in enumerate(groups):
            self._struct.groups[number] = ctypes.pointer(group)
            self._struct.there[number], self._struct.back[number] = there.struct, back.struct
            self._struct.there[number].bias = _at(bias)
        for number, (weight, eps) in enumerate(norms):
            self._struct.norms[number], self._struct.eps[number] = weight.data_ptr(), eps.item()

    @staticmethod
    def fits(norms: list, width: int, inner: int) -> bool:
        """Whether there is this for norms with such weights, heads of this width and so many numbers between down and up."""
        return takes(width) and width % (2 * LANES) == inner % (2 * LANES) == 0 and _rows(*(weight for weight, _ in norms))

    def scratch(self, batch: int, tokens: int) -> int:
        """The bytes that a pass of this size needs beside what layers keep; for one layer after the other."""
        return _library().scratch_bytes(ctypes.byref(self._struct), batch, tokens)

    def forward(self, hidden, cos, sin, scratch, wanted=None):
        """The output [rows, d] for hidden states [B, T, d], of all B T rows or of those in `wanted`, int64 in ascending order; and what
        `backward` needs. cos and sin [B or 1, T, width]."""
        batch, tokens, size = hidden.shape
        kept = torch.empty(_library().kept_bytes(ctypes.byref(self._struct), batch, tokens), dtype=torch.uint8)
        out = hidden.new_empty(batch * tokens if wanted is None else len(wanted), size)
        _run("layer_forward", ctypes.byref(self._struct), *map(_at, (kept, scratch, hidden, out, cos, sin)), len(cos) == 1, batch, tokens,
             *_wanted(wanted))
        return out, kept

    def backward(self, kept, grad, cos, sin, scratch, first: bool, wanted=None) -> None:
        """`grad` [B, T, d], that to the output (where rows are `wanted`, in its first rows), becomes that to the hidden states; not of the
        first layer, where nobody needs it."""
        batch, tokens, _ = grad.shape
        _run("layer_backward", ctypes.byref(self._struct), *map(_at, (kept, scratch, grad)), first, *map(_at, (cos, sin)), len(cos) == 1,
             batch, tokens, *_wanted(wanted))


def norm(x, weight, eps):
    """As `elementwise.norm`."""
    if not _rows(x, weight) or weight.dim() > 1:
        return NotImplemented
    normed, scaled, inverse = torch.empty_like(x), torch.empty_like(x), _float32(x.shape[0], 1)
    _run("norm", x.data_ptr(), weight.data_ptr(), eps.item(), normed.data_ptr(), inverse.data_ptr(), scaled.data_ptr(), *x.shape)
    return normed, inverse, scaled


def norm_back(grad, normed, inverse, weight, beside=None):
    """As `elementwise.norm_back`."""
    if not _rows(grad, normed, weight, *(() if beside is None else (beside,))) or grad.dim() > 2:
        return NotImplemented
    made = grad.new_empty(grad.shape)
    _run("norm_back", *map(_at, (grad, normed, inverse, weight, beside, made)), *grad.shape)
    return made


def rotate(x, cos, sin):
    """As `elementwise.rotate`."""
    width = x.shape[-1]
    if x.stride()[2:] != (width, 1) or width % (2 * LANES) or not _rows(cos, sin) or x.dtype != cos.dtype:
        return NotImplemented
    made = x.new_empty(x.shape)
    _run("rotate", x.data_ptr(), *x.stride()[:2], cos.data_ptr(), sin.data_ptr(), cos.shape[0] == 1, made.data_ptr(), *x.shape)
    return made


def rotate_back(of_q, of_k, of_v, cos, sin):
    """As `elementwise.rotate_back`."""
    batch, tokens, heads, width = of_q.shape
    keys = of_k.shape[2]
    if width % (2 * LANES) or not _rows(of_q, of_k, of_v, cos, sin):
        return NotImplemented
    made = of_q.new_empty(batch, tokens, heads + 2 * keys, width)
    _run("rotate_back", *map(_at, (of_q, of_k, of_v, cos, sin)), cos.shape[0] == 1, made.data_ptr(), batch, tokens, heads, keys, width)
    return made


def swiglu(both):
    """As `elementwise.swiglu`."""
    if not _rows(both) or both.shape[1] % (2 * LANES):
        return NotImplemented
    made = both.new_empty(both.shape[0], both.shape[1] // 2)
    _run("swiglu", both.data_ptr(), made.data_ptr(), *made.shape)
    return made


def swiglu_back(grad, both):
    """As `elementwise.swiglu_back`."""
    if not _rows(grad, both):
        return NotImplemented
    to_both, product = both.new_empty(both.shape), grad.new_empty(grad.shape)
    _run("swiglu_back", *map(_at, (grad, both, to_both, product)), *grad.shape)
    return to_both, product


def _run(name: str, *given) -> None:
    if getattr(_library(), name)(*given, torch.get_num_threads()):
        raise MemoryError(f"{name}: no memory")


def _rows(*tensors) -> bool:
    """Are these bfloat16 on the CPU, one number after the other, in rows of whole registers?"""
    return all(t.dtype == torch.bfloat16 and t.is_cpu and t.is_contiguous() and t.shape[-1] % LANES == 0 for t in tensors)


def _float32(*sides: int):
    return torch.empty(sides, dtype=torch.float32)


def _at(tensor) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _lined_up(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_heads(x):
    """Heads [B, n, T, width] that are [B, T, n, width] in memory."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


def _wanted(rows) -> tuple[int | None, int]:
    return (None, -1) if rows is None else (rows.data_ptr(), len(rows))


def _heads(x):
    return ctypes.byref(_Heads(x.data_ptr(), *x.stride()[:3]))


def _shape(q, k):
    return ctypes.byref(_Shape(*q.shape[:2], k.shape[1], *q.shape[2:]))
