"""The house is as its README draws it: `python -m pytest tests/test_house.py`."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "arc_kernel"


def rooms():
    """The row of each module and folder in the README's table."""
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## How to read the code")[2]
    rows = re.findall(r"^\| (`.+?`) \|", table, re.M)
    return {name.rstrip("/"): number for number, row in enumerate(rows) for name in re.findall(r"`([\w/]+)`", row)}


def imported(path):
    """Modules of the package that a file imports, as `a` or `a/b`."""
    inside = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*inside[: len(inside) + 1 - node.level], *(node.module or "").split(".")]
            names = ["/".join(filter(None, [*base, alias.name])) for alias in node.names]
            yield from (n if (PACKAGE / n).is_dir() or (PACKAGE / f"{n}.py").is_file() else n.rpartition("/")[0] for n in names)


def test_every_module_stands_in_the_readme_and_imports_from_rows_above():
    order = rooms()
    row = lambda name: order[name] if name in order else order[name.partition("/")[0]]
    turned_back = []
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).with_suffix("").as_posix()
        if path.name != "__init__.py":
            turned_back += [f"{name} imports {other}" for other in imported(path) if other and row(other) > row(name)]
    assert not turned_back
