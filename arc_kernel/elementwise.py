"""What a decoder layer does beside its matrix products and attention: norm, rotary and SwiGLU, forward and backward.

Written as plain torch operations without autograd, in place where that saves memory traffic. On a GPU each is compiled to one or two
kernels (torch.compile): as separate operations they were half of the GPU's time in a step of 8,192 tokens. On a CPU with avx512_bf16
`cpu_kernels` has a function for each, in a third to a seventh of the seconds. Whether these compute the same is tried once
(`compile_on_gpu`, `take_kernels`); where they do not, or there is no compiler, the plain operations run as they stand.
Norm: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization"; rotary: Su et al. 2021, "RoFormer"; SwiGLU: Shazeer 2020,
"GLU Variants Improve Transformer". Fusing them for small models is Liger's idea (Hsu et al. 2024).
"""

from __future__ import annotations

import functools

import torch
from torch.nn.functional import silu

from . import cpu_kernels
from .errors import named_line
from .memory import exhausted

TRIED = ((1, 80), (3, 112))  # batches and tokens of the trial; a batch of one is compiled for itself
CLOSE = 3e-2  # largest share of the largest value by which compiled and plain may differ: 16-bit rounding at other places
compiled: dict = {}  # plain piece to its compiled form, the one a process trains with; where it is empty none is used
trouble = ""  # why compiled pieces were given up; whoever tells of it empties it


def _piece(plain):
    @functools.wraps(plain)
    def call(*given):
        global trouble
        try:
            found = compiled.get(plain, plain)(*given)
            return plain(*given) if found is NotImplemented else found
        except Exception as error:  # a size or layout the trial did not have and the compiler cannot do
            if exhausted(error) or plain not in compiled:
                raise
            compiled.clear()
            trouble = named_line(error)
            return plain(*given)

    call.plain = plain
    return call


@_piece
def norm(x, weight, eps):
    """x [T, d] over its root mean square, in x's dtype; one over that root, float32 [T, 1]; and the first times `weight`. Of heads
    each by itself: x [B, T, n, width], weight [n, width]."""
    wide = x.float()
    size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    inverse = torch.addcmul(eps, size, size, value=1 / x.shape[-1]).rsqrt_()
    normed = (wide * inverse).to(x.dtype)
    return normed, inverse, normed * weight


@_piece
def norm_back(grad, normed, inverse, weight, beside=None):
    """Gradient to the norm's input from that to its output, plus `beside` where it is given; `grad` [T, d] is used up."""
    wide, seen = grad.float().mul_(weight), normed.float()
    along = (wide * seen).mean(-1, keepdim=True)
    made = wide.addcmul_(seen, along, value=-1).mul_(inverse).to(grad.dtype)
    return made if beside is None else made.add_(beside)


@_piece
def rotate(x, cos, sin):
    """Heads [B, T, n, width] turned by their position; cos and sin [B or 1, T, 1, width]."""
    return _turned(x, cos, sin, 1)


@_piece
def rotate_back(of_q, of_k, of_v, cos, sin):
    """Gradients to q and k turned back, and that to v as it is, heads after heads: [B, T, n + 2 m, width]."""
    return torch.cat([_turned(of_q, cos, sin, -1), _turned(of_k, cos, sin, -1), of_v], 2)


def _turned(x, cos, sin, way):
    half = x.shape[-1] // 2
    (first, second), (sin_first, sin_second) = x.split(half, -1), sin.split(half, -1)
    turned = x * cos
    to_first, to_second = turned.split(half, -1)
    if way > 0:
        to_first.addcmul_(second, sin_first, value=-1)
        to_second.addcmul_(first, sin_second)
    else:
        to_first.addcmul_(second, sin_second)
        to_second.addcmul_(first, sin_first, value=-1)
    return turned


@_piece
def swiglu(both):
    """silu(gate) * up of [T, 2 n], gate before up: [T, n]."""
    gate, up = both.chunk(2, 1)
    return silu(gate).mul_(up)


@_piece
def swiglu_back(grad, both):
    """Gradient to `both` [T, 2 n] from that to the product [T, n], and the product once more."""
    gate, up = both.chunk(2, 1)
    active = silu(gate)
    product = active * up
    return torch.cat([torch.ops.aten.silu_backward(grad * up, gate), active.mul_(grad)], 1), product


PIECES = norm, norm_back, rotate, rotate_back, swiglu, swiglu_back


@functools.cache
def compile_on_gpu(dtype: torch.dtype, device: str, hidden: int, inner: int, heads: int, keys: int, width: int,
                   head_norm: bool) -> str:
    """Compile all pieces for a model of these sizes, whose heads have a norm or not, and use them from now on if they compute what
    the plain ones do.

    Empty, or in one line why they are left as they are: no compiler on this machine, a GPU it does not know, wrong numbers.
    """
    return _taken({p.plain: torch.compile(p.plain, options={"compile_threads": 1}) for p in PIECES},
                  dtype, device, hidden, inner, heads, keys, width, head_norm)


@functools.cache
def take_kernels(hidden: int, inner: int, heads: int, keys: int, width: int, head_norm: bool) -> str:
    """The same with the functions of `cpu_kernels`, which are for bfloat16 on a CPU."""
    made = {p.plain: getattr(cpu_kernels, p.__name__) for p in PIECES}
    return cpu_kernels.refused() or _taken(made, torch.bfloat16, "cpu", hidden, inner, heads, keys, width, head_norm)


def _taken(made: dict, dtype: torch.dtype, device: str, hidden: int, inner: int, heads: int, keys: int, width: int, head_norm: bool) -> str:
    generator = torch.Generator().manual_seed(0)
    some = lambda *sides: torch.randn(sides, generator=generator).to(device, dtype)
    try:
        for batch, tokens in TRIED:
            rows, turn = batch * tokens, (some(1, tokens, 1, width), some(1, tokens, 1, width))
            both = some(batch, tokens, heads + 2 * keys, width)[:, :, :-keys]
            asked = ((norm, some(rows, hidden), some(hidden), torch.tensor(1e-5, device=device)),
                     (norm_back, some(rows, hidden), some(rows, hidden), some(rows, 1).float(), some(hidden)),
                     (norm_back, some(rows, hidden), some(rows, hidden), some(rows, 1).float(), some(hidden), some(rows, hidden)),
                     (rotate, both.contiguous() if head_norm else both, *turn),
                     (rotate_back, *(some(batch, tokens, n, width) for n in (heads, keys, keys)), *turn),
                     (swiglu, some(rows, 2 * inner)), (swiglu_back, some(rows, inner), some(rows, 2 * inner)))
            if head_norm:
                weight = some(heads + keys, width)
                asked += ((norm, both, weight, torch.tensor(1e-6, device=device)),
                          (norm_back, both, some(*both.shape), some(*both.shape[:3], 1).float(), weight))
            for piece, *given in asked:
                for tensor in (g for g in given if g.dim() > 1 and g.is_cuda):  # batch and tokens vary, a model's own sizes do not
                    torch._dynamo.maybe_mark_dynamic(tensor, (0, 1) if tensor.dim() > 2 else 0)
                with torch.no_grad():  # as in an autograd function
                    wanted, found = piece.plain(*(g.clone() for g in given)), made[piece.plain](*given)
                if found is NotImplemented:
                    continue
                for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (wanted, found))):
                    apart = ((one - other).abs().max() / one.abs().max()).item()
                    if not apart < CLOSE:
                        return f"{piece.__name__} compiled for this device is {apart:.2g} off"
    except Exception as error:  # whatever a compiler that is missing, or too old for this GPU, raises
        return named_line(error)
    compiled.update(made)
    return ""
