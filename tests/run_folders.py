"""Run folders made by hand, as `solve` leaves them: settings and completions of given answers, without a model."""

import json
from pathlib import Path

import numpy as np

from arc_kernel.grids import GridEncoder
from arc_kernel.run_folder import tasks_digest
from arc_kernel.select import Completion, status_of, write_completions
from arc_kernel.settings import Settings
from arc_kernel.tasks import load_challenges
from arc_kernel.views import SYMMETRIES, View


def write_tasks(path: Path, tasks: dict) -> Path:
    """A challenges file with one train pair a task and its solutions inside: id -> outputs (rows, None where not known)."""
    pair = lambda output: {"input": [[0, 0]]} | ({} if output is None else {"output": output})
    train = [{"input": [[1]], "output": [[2]]}]
    path.write_text(json.dumps({i: {"train": train, "test": [pair(o) for o in outputs]} for i, outputs in tasks.items()}))
    return path


def write_run(folder: Path, source, answers: dict, encoder: str = "digits", **settings) -> Path:
    """A run on `source`; `answers` are (task id, test index) -> grids (rows, or text that is no grid), seen under various views."""
    chosen = Settings(tasks=str(source), out=str(folder), grid_encoder=encoder, **settings)
    ids = [i for i in chosen.task_ids.split(",") if i]
    challenges = load_challenges(chosen.tasks, chosen.solutions).select(ids, chosen.limit)
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps(json.loads(chosen.to_json()) | {"tasks_sha256": tasks_digest(challenges)}))
    form, by_task = GridEncoder.from_name(encoder), {}
    for (task_id, index), grids in answers.items():
        for n, grid in enumerate(grids):
            view = View(n % len(SYMMETRIES), tuple(range(10)), ())
            text = grid if isinstance(grid, str) else form.encode(view.apply_grid(np.array(grid, np.int8)))
            by_task.setdefault(task_id, []).append(Completion(task_id, index, str(view), text, [1], -1.0, status_of("ok", text, form), 2))
    for task_id, completions in by_task.items():
        write_completions(folder / "completions" / f"{task_id}.jsonl", completions)
    return folder
