"""Seconds of attention in training, forward and backward: torch's CPU kernel against batched products, in turns.

    python -m benchmarks.attention [--dtype bfloat16] [--lengths 512,1024,2048] [--rounds 5] [--heads 9,3,64]

Printed per length: the best seconds of both, the ratio as the median over pairs, and what the products do a second, counted as
`ceilings` counts attention. The last line says which of the two training takes here.
"""

import argparse
import statistics

import torch

from arc_kernel import ceilings, cpu_attention
from arc_kernel.device import device_model
from arc_kernel.precision import verdict


def main() -> None:
    """Compare both at each length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="auto", choices=("auto", *ceilings.DTYPES), help="auto: what TaskTrainer takes on this device")
    parser.add_argument("--lengths", default="512,1024,2048", help="tokens, comma-separated")
    parser.add_argument("--rounds", type=int, default=5, help="pairs at each length")
    parser.add_argument("--heads", default="9,3,64", help="query heads, key heads, width of each; SmolLM2-135M's by default")
    options = parser.parse_args()
    name = verdict.candidates(options.dtype, "cpu")[0]
    dtype, (heads, keys, width) = getattr(torch, name), map(int, options.heads.split(","))
    print(f"{device_model('cpu')}, {name}, {torch.get_num_threads()} threads, product of {ceilings.SIDE}^3 at "
          f"{ceilings.gemm(name, 'cpu') / 1e9:.0f} GFLOP/s")
    print(f"{'tokens':>6}{'kernel, s':>11}{'products, s':>13}{'products/kernel':>17}{'min to max':>14}{'GFLOP/s':>9}{'peak':>6}")
    for tokens in map(int, options.lengths.split(",")):
        pairs = [tuple(cpu_attention.seconds(way, dtype, heads, keys, width, tokens)
                       for way in (cpu_attention.kernel, cpu_attention.products)) for _ in range(options.rounds + 1)][1:]
        of_kernel, of_products = (min(times) for times in zip(*pairs))
        ratios, flop = [b / a for a, b in pairs], 3.5 * 2.0 * tokens**2 * heads * width
        print(f"{tokens:6}{of_kernel:11.4f}{of_products:13.4f}{statistics.median(ratios):17.2f}"
              f"{f'{min(ratios):.2f} to {max(ratios):.2f}':>14}{flop / of_products / 1e9:9.0f}"
              f"{flop / of_products / ceilings.gemm(name, 'cpu'):6.0%}", flush=True)
    taken = name != "float32" and cpu_attention.products_are_faster(dtype, heads, keys, width)
    print(f"training takes {'products' if taken else 'the kernel'}")


if __name__ == "__main__":
    main()
