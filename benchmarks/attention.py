"""Seconds of attention in training, forward and backward, in turns: torch's CPU kernel, its forward with a gradient by batched
products (half), all by products, and compiled, in bfloat16 where there is a C compiler.

    python -m benchmarks.attention [--dtype bfloat16] [--lengths 512,1024,2048] [--rounds 5] [--heads 9,3,64]

Printed per length: the best seconds of each, the ratio to the kernel as the median over rounds, and what the best does a second,
counted as `ceilings` counts attention. The last line says which of them training takes here.
"""

import argparse
import statistics

import torch

from arc_kernel import ceilings, cpu_attention
from arc_kernel.device import device_model, prepare_for
from arc_kernel.precision import verdict
from arc_kernel.settings import LongHelp

def main() -> None:
    """Compare them at each length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=LongHelp)
    parser.add_argument("--dtype", default="auto", choices=("auto", *ceilings.DTYPES), help="auto: what TaskTrainer takes on this device")
    parser.add_argument("--lengths", default="512,1024,2048", help="tokens, comma-separated")
    parser.add_argument("--rounds", type=int, default=5, help="rounds at each length")
    parser.add_argument("--heads", default="9,3,64", help="query heads, key heads, width of each; SmolLM2-135M's by default")
    options = parser.parse_args()
    prepare_for("cpu")
    name = verdict.candidates(options.dtype, "cpu")[0]
    dtype, (heads, keys, width) = getattr(torch, name), map(int, options.heads.split(","))
    print(f"{device_model('cpu')}, {name}, {torch.get_num_threads()} threads, product of {ceilings.SIDE}^3 at "
          f"{ceilings.gemm(name, 'cpu') / 1e9:.0f} GFLOP/s")
    ways = cpu_attention.ways_of(dtype)
    beside = "".join(f"{f'{way.__name__}, s':>13}{f'{way.__name__}/kernel':>17}{'min to max':>14}" for way in ways[1:])
    print(f"{'tokens':>6}{'kernel, s':>11}{beside}{'GFLOP/s':>9}{'peak':>6}")
    for tokens in map(int, options.lengths.split(",")):
        rounds = [[cpu_attention.seconds(way, dtype, heads, keys, width, tokens) for way in ways] for _ in range(options.rounds + 1)][1:]
        best = [min(times) for times in zip(*rounds)]
        line = f"{tokens:6}{best[0]:11.4f}"
        for number in range(1, len(ways)):
            ratios = [times[number] / times[0] for times in rounds]
            line += f"{best[number]:13.4f}{statistics.median(ratios):17.2f}{f'{min(ratios):.2f} to {max(ratios):.2f}':>14}"
        speed = 3.5 * 2.0 * tokens**2 * heads * width / min(best)
        print(f"{line}{speed / 1e9:9.0f}{speed / ceilings.gemm(name, 'cpu'):6.0%}", flush=True)
    taken = cpu_attention.kernel if name == "float32" else cpu_attention.fastest(dtype)
    print(f"training takes {taken.__name__}")


if __name__ == "__main__":
    main()
