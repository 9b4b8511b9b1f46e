"""New tasks out of old ones: one transform more on the input side, or the output side, of every pair.

The rule of a task becomes that rule and the transform. Knows grids and pairs; nothing of text or models. A view changes both
sides alike and keeps the rule; a composition changes one side and makes another rule.

Source: arc24's composed tasks (github.com/ironbar/arc24, arc24/data_augmentation.py), written anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import numpy as np

from .tasks import COLOURS, MAX_SIDE, Grid, Pair
from .views import SYMMETRIES, turned

KINDS = ("symmetry", "mirror", "padding", "upscale")
SIDES = ("input", "output")
MIRRORS = ("right", "down", "both")  # where the mirrored copies stand
THICKEST = 3  # cells of a border
UPSCALES = tuple((r, c) for r in (1, 2, 3) for c in (1, 2, 3) if r * c > 1)  # times down, times right
DRAWS = 64  # a symmetry fits every task: only where all grids look alike from every side, and are too large to grow, are they in vain


@dataclass(frozen=True)
class Composition:
    """A transform `kind` of one `side` with its numbers; prints as `output mirror both`."""

    side: str
    kind: str
    numbers: tuple[int, ...]

    def __str__(self) -> str:
        a = self.numbers
        shown = {"symmetry": lambda: SYMMETRIES[a[0]], "mirror": lambda: MIRRORS[a[0]], "padding": lambda: f"{a[0]} of colour {a[1]}",
                 "upscale": lambda: f"{a[0]}x{a[1]}"}[self.kind]()
        return f"{self.side} {self.kind} {shown}"

    def apply_grid(self, grid: Grid) -> Grid:
        """The transformed grid int8 [rows, columns], which may be larger than ARC allows."""
        a = self.numbers
        if self.kind == "symmetry":
            return np.ascontiguousarray(turned(grid, a[0]))
        if self.kind == "mirror":
            wide = grid if MIRRORS[a[0]] == "down" else np.hstack([grid, np.fliplr(grid)])
            return wide if MIRRORS[a[0]] == "right" else np.vstack([wide, np.flipud(wide)])
        if self.kind == "padding":
            return np.pad(grid, a[0], constant_values=a[1])
        return grid.repeat(a[0], 0).repeat(a[1], 1)

    def apply(self, pairs: Sequence[Pair]) -> tuple[Pair, ...] | None:
        """The pairs with this side transformed; None where a grid would pass 30x30, or where nothing would change."""
        old = [getattr(p, self.side) for p in pairs]
        new = [self.apply_grid(g) for g in old]
        if any(max(g.shape) > MAX_SIDE for g in new) or all(map(np.array_equal, old, new)):
            return None
        return tuple(Pair(g, p.output) if self.side == "input" else Pair(p.input, g) for p, g in zip(pairs, new))


def draw(rng: np.random.Generator, sides: Sequence[str] = SIDES) -> Composition:
    """A composition drawn at random: side and kind evenly, then its numbers."""
    side, kind = sides[rng.integers(len(sides))], KINDS[rng.integers(len(KINDS))]
    numbers = {"symmetry": lambda: (1 + rng.integers(len(SYMMETRIES) - 1),), "mirror": lambda: (rng.integers(len(MIRRORS)),),
               "padding": lambda: (1 + rng.integers(THICKEST), rng.integers(COLOURS)),
               "upscale": lambda: UPSCALES[rng.integers(len(UPSCALES))]}[kind]()
    return Composition(side, kind, tuple(map(int, numbers)))


def compose(pairs: Sequence[Pair], rng: np.random.Generator, sides: Sequence[str] = SIDES) -> tuple[tuple[Pair, ...], Composition | None]:
    """The pairs of a new task and what was composed; drawn again until it fits into 30x30 and changes something.

    None, and the pairs as they are, only where DRAWS draws found nothing.
    """
    for _ in range(DRAWS):
        drawn = draw(rng, sides)
        made = drawn.apply(pairs)
        if made is not None:
            return made, drawn
    return tuple(pairs), None
