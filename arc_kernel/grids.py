"""Grid <-> text: encoders composed by name, each an exact round trip.

A name is parts joined by `+`, outermost first, the cells last: `fenced+shape+rows+digits`. Text is a sequence of lines;
a line is given as *pieces* (strings), so that prompts can turn each piece into token ids without searching text. Knows
nothing of tokens or tasks.

Sources: row numbers, shape and code fence are arc24's encoders (github.com/ironbar/arc24, arc24/encoders.py: there
GridShapeEncoder(RowNumberEncoder(MinimalGridEncoder()))), written anew.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

import numpy as np

from .errors import ArcKernelError
from .tasks import MAX_SIDE, Grid

WRAPPERS = ("fenced", "shape", "rows")  # in the order in which a name may give them
CELLS = {"digits": "", "spaced": " "}  # name of the cell part -> what stands between two cells
ENCODERS = tuple("+".join([*itertools.compress(WRAPPERS, flags), cells])
                 for flags in itertools.product((0, 1), repeat=len(WRAPPERS)) for cells in CELLS)  # the name of each encoder there is
FENCE_OPEN, FENCE_CLOSE = "```grid", "```"


class Unparsable(ValueError):
    """Text that is not exactly what the encoder writes for some grid."""


@dataclass(frozen=True)
class GridEncoder:
    """One way to write a grid. `separator` stands between cells; the flags say which lines and prefixes there are."""

    name: str
    fenced: bool
    shape: bool
    rows: bool
    separator: str

    @classmethod
    def from_name(cls, name: str) -> "GridEncoder":
        """The encoder of a name such as `shape+rows+digits`; raises ArcKernelError that lists the parts."""
        *wrappers, cells = name.split("+")
        order = [WRAPPERS.index(w) for w in wrappers if w in WRAPPERS]
        if cells not in CELLS or len(order) != len(wrappers) or order != sorted(set(order)):
            raise ArcKernelError(f"grid_encoder {name!r}: give [fenced+][shape+][rows+] in this order, then {' or '.join(CELLS)}")
        return cls(name, *(w in wrappers for w in WRAPPERS), CELLS[cells])

    def lines(self, grid: Grid) -> list[list[str]]:
        """The lines of a grid, each a list of pieces: words as one piece, cells and separators one piece each."""
        head = [[FENCE_OPEN]] * self.fenced + [[_shape_line(grid.shape)]] * self.shape
        return head + [self._row(number, row) for number, row in enumerate(grid.tolist(), 1)] + [[FENCE_CLOSE]] * self.fenced

    def encode(self, grid: Grid) -> str:
        """The text of a grid: its lines joined by newlines, with none at the end."""
        return "\n".join("".join(pieces) for pieces in self.lines(grid))

    def decode(self, text: str) -> Grid:
        """The grid int8 [rows, columns] whose encoding is exactly `text`; raises Unparsable otherwise."""
        cells = self._read(text, complete=True)
        grid = np.array(cells, dtype=np.int8)
        if self.encode(grid) != text:
            raise Unparsable(f"does not round-trip: {text[:40]!r}")
        return grid

    def may_begin(self, text: str) -> bool:
        """Whether some grid's encoding could start with `text`: False means that going on generating is wasted."""
        try:
            self._read(text, complete=False)
            return True
        except Unparsable:
            return False

    def longest(self) -> Grid:
        """A grid whose encoding is the longest there is: 30x30."""
        return np.zeros((MAX_SIDE, MAX_SIDE), dtype=np.int8)

    def _row(self, number: int, row: list[int]) -> list[str]:
        pieces = [self._row_head(number)] if self.rows else []
        for i, cell in enumerate(row):
            pieces += [self.separator, str(cell)] if i and self.separator else [str(cell)]
        return pieces

    def _row_head(self, number: int) -> str:
        return f"{number} "

    def _read(self, text: str, complete: bool) -> list[list[int]]:
        """The cells of the rows in `text`. Without `complete`, the last line may be cut short anywhere."""
        lines = text.split("\n")
        last = len(lines) - 1
        height, width, rows, position = None, None, [], 0
        partial = lambda: not complete and position == last
        if self.fenced:
            _expect(lines[0], FENCE_OPEN, partial())
            position += 1
        if self.shape and position <= last:
            height, width = _read_shape(lines[position], partial())
            position += 1
        while position <= last:
            line, number = lines[position], len(rows) + 1
            finished = number > MAX_SIDE or (height is not None and number > height)
            if self.fenced and rows and line[:1] == FENCE_CLOSE[0] and (height is None or finished):
                _expect(line, FENCE_CLOSE, partial())
                if position != last:
                    raise Unparsable("text after the closing fence")
                return rows
            if finished and not (self.fenced and partial() and line == ""):
                raise Unparsable(f"more than {number - 1} rows")
            if not finished:
                row = self._read_row(line, number, width, partial())
                if not partial():
                    width = len(row)
                    rows.append(row)
            position += 1
        if complete and (self.fenced or not rows or (height is not None and len(rows) != height)):
            raise Unparsable("ends too early")
        return rows

    def _read_row(self, line: str, number: int, width: int | None, partial: bool) -> list[int]:
        head = self._row_head(number) if self.rows else ""
        if partial and head.startswith(line):
            return []
        if not line.startswith(head):
            raise Unparsable(f"row {number} does not start with {head!r}")
        body = line[len(head):]
        step = 1 + len(self.separator)
        cells, gaps = body[::step], [body[i:i + step - 1] for i in range(1, len(body), step)]
        if not cells or not re.fullmatch("[0-9]+", cells):
            raise Unparsable(f"row {number}: cells are not digits: {body[:40]!r}")
        if any(gap != self.separator for gap in gaps) or (not partial and len(body) % step != 1 % step):
            raise Unparsable(f"row {number}: cells are not separated by {self.separator!r}")
        begun = len(cells) + (len(gaps) == len(cells))  # a separator at the end promises one more cell
        if begun > (width or MAX_SIDE) or (not partial and width is not None and len(cells) != width):
            raise Unparsable(f"row {number} has {len(cells)} cells, expected {width or f'at most {MAX_SIDE}'}")
        return [int(c) for c in cells]


def _shape_line(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _read_shape(line: str, partial: bool) -> tuple[int | None, int | None]:
    side = "([1-9]|[12][0-9]|30)"
    if match := re.fullmatch(f"{side}x{side}", line):
        return int(match[1]), int(match[2])
    if partial and (line == "" or re.fullmatch(f"{side}x?", line)):
        return None, None
    raise Unparsable(f"not a shape: {line[:20]!r}")


def _expect(line: str, wanted: str, partial: bool) -> None:
    if line != wanted and not (partial and wanted.startswith(line)):
        raise Unparsable(f"expected {wanted!r}, found {line[:20]!r}")

