"""The answers that lie in a run's folder: read back, put aside where they are damaged or to be made anew. Knows nothing of how they are
made."""

from __future__ import annotations

from pathlib import Path

from . import select
from .errors import ArcKernelError
from .events import EventLog, read_events
from .grids import GridEncoder
from .run_folder import completions_file
from .tasks import Challenges

DAMAGED = ".damaged"  # at the end of a file's name: it is not read


class Stored:
    """The completions of a run's tasks in its output folder `out`."""

    def __init__(self, out: Path, challenges: Challenges, encoder: GridEncoder, log: EventLog):
        self.out, self.challenges, self.encoder, self.log = out, challenges, encoder, log

    def whole(self, task_id: str) -> Path:
        """The file of a task that is answered as it was asked to be."""
        return self.out / "completions" / f"{task_id}.jsonl"

    def all_candidates(self, mine: bool) -> dict[str, list]:
        """Candidates of the tasks that were answered, in whole or in part. Where the folder is `mine`, what is damaged, or has fewer
        predictions than its events say, is renamed: those tasks are answered again."""
        answered = (e for e in read_events(self.out) if e["event"] == "answered" and not e.get("cut"))
        made = {e["task"]: sum(e.get("statuses", {}).values()) for e in answered}
        found = {i: self.candidates(i, made.get(i, 0), mine) for i in self.challenges.tasks}
        return {i: candidates for i, candidates in found.items() if candidates is not None}

    def candidates(self, task_id: str, least: int = 0, mine: bool = False) -> list | None:
        """Candidates of a task by test input; None where there are none, or no sound ones of at `least` so many predictions."""
        while (path := completions_file(self.out, task_id)) is not None:
            try:
                made = select.read_completions(path)
                if len(made) >= least or path != self.whole(task_id):
                    return select.all_candidates(self.challenges.tasks[task_id], made, self.encoder)
                wrong = f"{path}: {len(made)} of {least} predictions"
            except ArcKernelError as error:
                wrong = str(error)
            if not mine:
                break
            path.replace(path.with_name(path.name + DAMAGED))
            self.log.say("note", task=task_id, text=f"task {task_id} is answered again, {path.name} is put aside as {path.name}{DAMAGED}: "
                                                    f"{wrong}")
        return None

    def set_aside(self, task_id: str) -> None:
        """Put a task's completions with those that a next start makes anew."""
        if (whole := self.whole(task_id)).is_file():
            whole.replace(whole.with_name(whole.name + select.PARTIAL))
