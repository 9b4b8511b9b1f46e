"""docs/kaggle.md: its commands in their order, as one shell would run them, and its table of failures.

What is replaced: Kaggle by a stand-in on the loopback that takes any token; `.venv` by one that leads to the Python of the
tests, where pip finds what the page installs and looks at nothing else; wheels and weights by small ones (`clone`). The page
leaves an edit of the notebook to the reader: here it is made. Client, build_kernel.py, make and jupytext are the real ones.

    python -m pytest tests/test_kaggle_page.py
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import clone
from arc_kernel.kaggle import profiles

pytest.importorskip("cryptography", reason="the stand-in's certificate needs it")
from kaggle_standin import Standin  # noqa: E402

PAGE = (clone.HOME / "docs/kaggle.md").read_text(encoding="utf-8")
EDIT = "sed -i.old 's/^views = 32/views = 64/' notebooks/submission.py && rm notebooks/submission.py.old\n"
NAMES = ("arc-kernel-wheels-kaggle-t4", "arc-kernel-smollm2-135m", "arc-kernel-code")
missing = [name for name in ("kaggle", "six", "jupytext") if importlib.util.find_spec(name) is None]
needed = pytest.mark.skipif(bool(missing) or not shutil.which("make"), reason=f"make, or {missing}, is not installed")


def virtual_environment(folder: Path) -> None:
    """What `make venv` would make, as far as the page uses it; the installed-* marks keep make from installing."""
    (folder / "bin").mkdir(parents=True)
    for name, call in (("python", ""), ("kaggle", "-P -m kaggle")):
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {call} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    (folder / "bin/activate").write_text(f'PATH="{folder / "bin"}:$PATH"\n')
    for lock in ("requirements.txt", "requirements-cpu.txt"):
        (folder / f"installed-{lock}").touch()


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The page's commands, all run: the clone, the stand-in, what was printed."""
    home = tmp_path_factory.mktemp("page")
    repository = clone.make(home / "clone")
    virtual_environment(repository / ".venv")
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    with Standin(home) as standin:
        standin.answers["security.OAuthService/IntrospectToken"] = (200, {"active": True, "username": "you"})
        script = "".join(EDIT + block if "make notebook" in block else block for block in blocks)
        environment = clone.environment(repository) | standin.environment | {
            "HOME": str(home), "XDG_CONFIG_HOME": str(home), "PIP_NO_DEPS": "1"}
        done = subprocess.run(["bash", "-euvc", script], cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "error" not in done.stderr and standin.hosts <= {"api.kaggle.com"}
    return repository, standin, done.stdout


@needed
def test_the_page_leads_to_two_pushes_and_two_submissions(walked):
    repository, standin, said = walked
    assert [body["slug"] for body in standin.called("CreateDataset")] == list(NAMES)  # wheels first
    assert [body["datasetSlug"] for body in standin.called("CreateDatasetVersion")] == ["arc-kernel-code"]
    made = [endpoint.rpartition("/")[2] for endpoint, _ in standin.requests]
    assert made.index("SaveKernel") > max(i for i, name in enumerate(made) if name == "CreateDataset")
    first, second = standin.called("SaveKernel")
    assert first["slug"] == "you/arc-kernel-submission" and first["datasetDataSources"] == [f"you/{name}" for name in NAMES]
    assert (first["machineShape"], first["enableInternet"]) == ("NvidiaTeslaT4", False)
    assert first["dockerImage"] == profiles.load("kaggle-t4").docker_image and "dockerImagePinningType" not in first
    assert "views = 32" in first["text"] and "views = 64" in second["text"]
    submitted = standin.called("CreateCodeSubmission")
    assert [(body["kernelVersion"], body["fileName"], body["submissionDescription"]) for body in submitted] == [
        (1, "submission.json", "first"), (2, "submission.json", "more views")]
    assert {(body["competitionName"], body["kernelSlug"]) for body in submitted} == {("arc-prize-2026-arc-agi-2", "arc-kernel-submission")}
    assert (repository / "runs/kaggle/submission.json").read_bytes() == standin.output["submission.json"]
    for words in ("kaggle_datasets/arc-kernel-notebook: no fault", "Kernel version 1 successfully pushed",
                  "Kernel version 2 successfully pushed", 'you/arc-kernel-submission has status "KernelWorkerStatus.COMPLETE"',
                  "submission: submission.json", "29.00h", "4.17"):
        assert words in said


@needed
def test_the_token_is_in_no_file(walked):
    repository, _, said = walked
    token = re.search("KAGGLE_API_TOKEN=(\\S+)", PAGE)[1]
    files = [f for f in repository.parent.rglob("*") if f.is_file() and f != repository / "docs/kaggle.md"]
    assert files and token not in said and not any(token.encode() in f.read_bytes() for f in files)


def test_each_failure_of_the_table_is_one_the_code_can_say():
    source = "\n".join(f.read_text(encoding="utf-8") for f in (clone.HOME / "arc_kernel").rglob("*.py"))
    plain = re.sub(r"\{[^{}]*\}", "\0", re.sub(r'"\s*\n\s*f?"', "", source))  # lines of one message joined, values as gaps
    rows = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| ") and " | `" in line]
    quoted = [(row[1], part.strip()) for row in rows for text in re.findall(r"`([^`]+)`", row[1]) for part in text.split("…")]
    assert len(rows) > 25
    assert [(row, part) for row, part in quoted if part not in plain] == []
