"""A run's output folder read back: its settings, tasks and completions. Knows files; loads no model and changes nothing."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from .errors import ArcKernelError
from .events import read_events, stage_rows
from .files import read_json, short_path
from .grids import GridEncoder
from .select import PARTIAL, Candidate, Completion, Voted, ranked, read_completions, voted_grids
from .settings import Settings
from .tasks import Challenges, load_challenges, task_to_json


@dataclass(frozen=True)
class RunFolder:
    """A run as it lies in `path`; `completions` has the tasks that were answered, in whole or in part."""

    path: Path
    settings: Settings
    challenges: Challenges
    completions: dict[str, list[Completion]]
    _voted: dict[tuple[str, int], list[Voted]] = field(default_factory=dict, compare=False)

    @functools.cached_property
    def encoder(self) -> GridEncoder:
        """The encoder in which this run's completions are written."""
        return GridEncoder.from_name(self.settings.grid_encoder)

    def answers(self, task_id: str, test_index: int) -> list[Completion]:
        """The completions of one test input, however they ended."""
        return [c for c in self.completions.get(task_id, ()) if c.test_index == test_index]

    def voted(self, task_id: str, test_index: int) -> list[Voted]:
        """Distinct grids of one test input's completions with what voted for them; read once."""
        where = task_id, test_index
        if where not in self._voted:
            self._voted[where] = voted_grids(self.answers(*where), self.encoder)
        return self._voted[where]

    @functools.cached_property
    def candidates(self) -> dict[str, list[list[Candidate]]]:
        """Candidates of each test input of the tasks that were answered, best first."""
        return {i: [ranked(self.voted(i, k)) for k in range(self.challenges.outputs[i])] for i in self.completions}


def read_run(path: Path, tasks: str = "", solutions: str = "", scored: bool = True) -> RunFolder:
    """Read a run's folder; `tasks` are given where those its settings name are not on this machine. Where nothing is `scored`, the
    solutions they name are not looked for.

    Raises ArcKernelError in one line where it holds no run, no completions, or answers to other tasks.
    """
    settings, digest = stored_settings(path)
    solutions = solutions or settings.solutions if scored else ""
    challenges = load_challenges(tasks or settings.tasks, solutions).select(settings.ids, settings.limit)
    if tasks_digest(challenges) != digest:
        raise ArcKernelError(f"{path}: answers other tasks than {challenges.source} holds: give the run's own with --tasks")
    files = {i: completions_file(path, i) for i in challenges.tasks}
    completions = {i: read_completions(file) for i, file in files.items() if file is not None}
    if not completions:
        raise ArcKernelError(f"{path / 'completions'}: no completions: start solve again on this folder, or give another run")
    return RunFolder(path, settings, challenges, completions)


def facts(run: RunFolder) -> dict:
    """What a run is, as JSON: model and adapter (None: none) by the ends of their paths, steps, views, prompt, grid encoder; and as
    events.jsonl tells, the `dtype` it answered in (None: not told) and `seconds` of its stages, summed over workers and starts."""
    s, events = run.settings, read_events(run.path)
    dtypes = [e["dtype"] + " rescaled" * bool(e.get("rescale")) for e in events if e.get("event") == "verdict" and e.get("dtype")]
    return {"model": short_path(s.model), "adapter": short_path(s.adapter) or None, "ttt_steps": s.ttt_steps, "views": s.views,
            "prompt": s.prompt, "grid_encoder": s.grid_encoder, "dtype": ", ".join(dict.fromkeys(dtypes)) or None,
            "seconds": {row["stage"]: row["seconds"] for row in stage_rows(events)}}


def facts_shown(of: dict) -> dict[str, str]:
    """`facts` for a table, by heading; `-` where something is not known."""
    spent = lambda stage: [seconds for name, seconds in of["seconds"].items() if name.startswith(stage)]
    seconds = lambda stage: f"{sum(spent(stage)):.0f} s" if spent(stage) else "-"
    return {"model": of["model"], "adapter": of["adapter"] or "none", "steps": str(of["ttt_steps"]), "views": str(of["views"]),
            "prompt": of["prompt"], "grid encoder": of["grid_encoder"], "dtype": of["dtype"] or "-",
            "training": seconds("adapt") if of["ttt_steps"] else "none", "answering": seconds("answer")}


def completions_file(path: Path, task_id: str) -> Path | None:
    """The completions of a task in a run's folder, else what the time budget left of them, else None."""
    whole = path / "completions" / f"{task_id}.jsonl"
    return next((p for p in (whole, whole.with_name(whole.name + PARTIAL)) if p.is_file()), None)


def stored_settings(out: Path) -> tuple[Settings, str]:
    """Settings and task digest of settings.json in a run folder; raises ArcKernelError naming the file."""
    path = out / "settings.json"
    try:
        stored = read_json(path)
        if not isinstance(stored, dict):
            raise ValueError("no JSON object")
        return Settings.from_parameters({k: v for k, v in stored.items() if not k.endswith("_sha256")}), stored["tasks_sha256"]
    except (FileNotFoundError, NotADirectoryError):
        raise ArcKernelError(f"{path}: no such file: give the output folder of a run") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArcKernelError) as error:
        raise ArcKernelError(f"{path}: not the settings of a run ({error}): give another --out") from None


def tasks_digest(challenges: Challenges) -> str:
    """The sha256 of tasks as a run sees them: without test outputs."""
    tasks = {i: task_to_json(t) for i, t in challenges.tasks.items()}
    return hashlib.sha256(json.dumps([tasks, challenges.outputs], sort_keys=True).encode()).hexdigest()
