"""Invertible augmentations: a view says how a task is seen, and how an answer is seen back.

8 symmetries of the square x colour permutations x orders of the train pairs. A view is a value, printable and
reproducible from a seed. Knows nothing of text or models.

Sources: the three families are those of the ARChitects (github.com/da-fr/arc-prize-2024, arc_loader.py) and of arc24
(github.com/ironbar/arc24, arc24/data_augmentation.py); written anew.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from dataclasses import dataclass
from typing import Sequence

import numpy as np

from .tasks import COLOURS, Grid, Pair, Task

SYMMETRIES = ("identity", "rot90", "rot180", "rot270", "flip", "flip.rot90", "flip.rot180", "flip.rot270")


def turned(grid: Grid, symmetry: int) -> Grid:
    """A grid [rows, columns] under the symmetry of this index in SYMMETRIES: mirrored first, then turned."""
    return np.rot90(np.fliplr(grid) if symmetry >= 4 else grid, symmetry % 4)


@dataclass(frozen=True)
class View:
    """How a task is seen: an index into SYMMETRIES, the new colour of each colour, the new order of the train pairs."""

    symmetry: int
    colours: tuple[int, ...]
    order: tuple[int, ...]

    def __str__(self) -> str:
        return f"{SYMMETRIES[self.symmetry]}|{''.join(map(str, self.colours))}|{','.join(map(str, self.order))}"

    @classmethod
    def identity(cls, pairs: int) -> "View":
        """The view that shows a task of so many train pairs as it is."""
        return cls(0, tuple(range(COLOURS)), tuple(range(pairs)))

    @classmethod
    def parse(cls, text: str) -> "View":
        """The view that prints as `text`; raises ValueError for text no view prints as."""
        symmetry, colours, order = text.split("|")
        view = cls(SYMMETRIES.index(symmetry), tuple(map(int, colours)), tuple(map(int, order.split(","))) if order else ())
        if sorted(view.colours) != list(range(COLOURS)) or sorted(view.order) != list(range(len(view.order))) or str(view) != text:
            raise ValueError(f"not a view: {text!r}")
        return view

    def apply(self, task: Task) -> Task:
        """The task as this view shows it; `order` must have one entry per train pair (ValueError otherwise)."""
        if len(self.order) != len(task.train):
            raise ValueError(f"view of {len(self.order)} train pairs on task {task.id} with {len(task.train)}")
        return Task(task.id, tuple(self.apply_pair(task.train[i]) for i in self.order),
                    tuple(self.apply_pair(p) for p in task.test))

    def apply_pair(self, pair: Pair) -> Pair:
        """A pair as this view shows it."""
        return Pair(self.apply_grid(pair.input), None if pair.output is None else self.apply_grid(pair.output))

    def apply_grid(self, grid: Grid) -> Grid:
        """A grid as this view shows it."""
        return np.ascontiguousarray(np.array(self.colours, dtype=np.int8)[turned(grid, self.symmetry)])

    def undo(self, grid: Grid) -> Grid:
        """The exact inverse of `apply_grid`."""
        back = np.rot90(np.argsort(self.colours).astype(np.int8)[grid], -(self.symmetry % 4))
        return np.ascontiguousarray(np.fliplr(back) if self.symmetry >= 4 else back)


def task_rng(seed: int, task_id: str, purpose: str) -> np.random.Generator:
    """The random generator of one purpose for one task, so that neither task order nor worker count changes anything."""
    digest = hashlib.sha256(f"{seed}/{task_id}/{purpose}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def random_view(pairs: int, rng: np.random.Generator, permute_background: bool = False) -> View:
    """A view drawn uniformly: symmetry, colours (0 stays 0 unless `permute_background`), order of `pairs` train pairs."""
    fixed = 0 if permute_background else 1
    colours = (*range(fixed), *(int(c) + fixed for c in rng.permutation(COLOURS - fixed)))
    return View(int(rng.integers(8)), colours, tuple(map(int, rng.permutation(pairs))))


def spread_views(task: Task, test_index: int, n: int, rng: np.random.Generator, permute_background: bool = False) -> list[View]:
    """Up to `n` views that show `task` and its test input `test_index` in distinct ways, spread evenly over the symmetries.

    The first is the identity. Fewer than `n` are returned only where fewer distinct prompts exist: colours that do not
    occur, and symmetries of the grids themselves, give no new view.
    """
    used = _colours_used(task, test_index)
    identity = View.identity(len(task.train))
    found, seen = [identity], {_fingerprint(identity, task, test_index)}
    draws = _draws(task, used, rng, permute_background, n)
    sources = {s: draws(s) for s in (*map(int, rng.permutation(np.arange(1, 8))), 0)}
    while sources and len(found) < n:
        for symmetry in list(sources):
            if len(found) >= n:
                break
            view = next((v for v in sources[symmetry] if _fingerprint(v, task, test_index) not in seen), None)
            if view is None:
                del sources[symmetry]
                continue
            seen.add(_fingerprint(view, task, test_index))
            found.append(view)
    return found


def shared_views(task: Task, tests: Sequence[int], n: int, seed: int, permute_background: bool = False) -> dict[int, list[View]]:
    """Up to `n` views for each of these test inputs, as `spread_views` spreads them.

    They are the same for all test inputs that they show in distinct ways, so that prompts of one view begin alike: drawn
    for the one with the most colours, since other colours take what its leave. A test input with fewer prompts has its own.
    """
    own = lambda i: spread_views(task, i, n, task_rng(seed, task.id, f"views {i}"), permute_background)
    lead = max(tests, key=lambda i: len(_colours_used(task, i)))
    views = own(lead)
    fit = lambda i: len({_fingerprint(v, task, i) for v in views}) == n
    return {i: views if i == lead or fit(i) else own(i) for i in tests}


def _draws(task, used, rng, permute_background, n):
    """A function symmetry -> iterator of views: all in random order where they are few, else random draws for ever.

    64 n views hold n distinct prompts, so drawing ends: recolouring that only moves pairs about makes at most 4! = 24 views
    alike with 4 colours, and with 5 colours there are 15120 images of them alone.
    """
    fixed = 0 if permute_background else 1
    free = [c for c in used if c >= fixed]
    kinds = [_shown(p.input, p.output) for p in task.train]
    image_count = math.perm(COLOURS - fixed, len(free))
    order_count = math.factorial(len(kinds)) // math.prod(map(math.factorial, Counter(kinds).values()))

    def few(symmetry):
        images = list(itertools.permutations(range(fixed, COLOURS), len(free)))
        orders = list(_orders(kinds))
        return (View(symmetry, _complete(dict(zip(free, images[i // len(orders)])), fixed), orders[i % len(orders)])
                for i in rng.permutation(len(images) * len(orders)))

    def many(symmetry):
        while True:
            drawn = random_view(len(task.train), rng, permute_background)
            yield View(symmetry, _complete({c: drawn.colours[c] for c in free}, fixed), drawn.order)

    return few if image_count * order_count < 64 * n else many


def _orders(kinds: list, placed: tuple[int, ...] = ()):
    """The orders of the train pairs that differ in what they show: pairs of one kind never change places."""
    if len(placed) == len(kinds):
        yield placed
    left = {kind: i for i, kind in reversed(list(enumerate(kinds))) if i not in placed}
    for i in sorted(left.values()):
        yield from _orders(kinds, (*placed, i))


def _complete(images: dict[int, int], fixed: int) -> tuple[int, ...]:
    """A permutation with the given images; colours without one take what is left, in order, so equal views are equal."""
    left = iter(sorted(set(range(fixed, COLOURS)) - set(images.values())))
    return tuple(c if c < fixed else images[c] if c in images else next(left) for c in range(COLOURS))


def _colours_used(task: Task, test_index: int) -> list[int]:
    grids = [g for p in task.train for g in (p.input, p.output)] + [task.test[test_index].input]
    return sorted({int(c) for g in grids for c in np.unique(g)})


def _fingerprint(view: View, task: Task, test_index: int) -> tuple:
    """What the prompt of this view will show, test output excluded."""
    grids = [g for i in view.order for g in (task.train[i].input, task.train[i].output)] + [task.test[test_index].input]
    return _shown(*map(view.apply_grid, grids))


def _shown(*grids: Grid) -> tuple:
    return tuple((g.shape, g.tobytes()) for g in grids)
