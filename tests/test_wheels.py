"""The wheelhouse, offline: small wheels made here, real pip (and uv where it is installed), the committed locks.

    python -m pytest tests/test_wheels.py
"""

import dataclasses
import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from arc_kernel import bundle
from arc_kernel.errors import ArcKernelError
from arc_kernel.kaggle import check, lock, profiles, resolve, wheels
from small_wheels import make_wheel

T4 = profiles.load("kaggle-t4")
QUIET = {"say": lambda line: None}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def error_of(call, *arguments, **named) -> str:
    with pytest.raises(ArcKernelError) as caught:
        call(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """The only place that pip and uv find packages in."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": folder, "PIP_CONFIG_FILE": "/dev/null",
                        "UV_OFFLINE": "1", "UV_FIND_LINKS": folder, "UV_CACHE_DIR": tmp_path / "uv"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("ARC_KERNEL_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A package folder with no requirements of its own, an image with one package, and room for locks."""
    (tmp_path / "home/images").mkdir(parents=True)
    (tmp_path / "home/images/image.txt").write_text("# an image\nbase==1.0\n")
    (tmp_path / "home/requirements.txt").write_text("# nothing\n")
    monkeypatch.setattr(profiles, "HERE", tmp_path / "home")
    monkeypatch.setattr(wheels, "HERE", tmp_path / "home")
    monkeypatch.setattr(check, "PACKAGE_REQUIREMENTS", tmp_path / "home/requirements.txt")
    return tmp_path / "home"


def profile(*requirements, **values):
    return dataclasses.replace(T4, name="small", image="image.txt", requirements=requirements, as_of="", remove=(), **values)


@pytest.fixture
def locked(index, home, tmp_path):
    """The profile of a lock of three wheels, one only for Python 3.12 on Linux; all are in the cache, as after a download."""
    made = [make_wheel(index, "engine", requires=["part>=1", "base"]), make_wheel(index, "part", "1.5"),
            make_wheel(index, "native", tag="cp312-abi3-manylinux_2_31_x86_64")]
    (home / "locks").mkdir()
    pins = [lock.Pin(f.name.split("-")[0], f.name.split("-")[1], (sha256(f),)) for f in made]
    (home / "locks/small.txt").write_text(lock.render(pins, ["a lock"]))
    shutil.copytree(index, tmp_path / "cache/wheels")
    return profile("engine==1.0", "native")


# The bundle


def test_bundle_holds_the_wheels_and_a_lock_that_installs_without_an_index(locked, tmp_path, monkeypatch):
    folder = wheels.build(tmp_path / "out", locked, "someone", **QUIET)
    found = bundle.find_bundles(tmp_path / "out")["wheels"]
    bundle.verify(found)
    assert found.folder == folder == tmp_path / "out/arc-kernel-wheels-small"
    assert set(found.manifest["files"]) == {"lock.txt", "wheels/engine-1.0-py3-none-any.whl", "wheels/part-1.5-py3-none-any.whl",
                                            "wheels/native-1.0-cp312-abi3-manylinux_2_31_x86_64.whl"}
    assert (found.manifest["profile"], found.manifest["python"], found.manifest["remove"]) == ("small", "3.12", [])
    monkeypatch.delenv("PIP_FIND_LINKS")
    done = subprocess.run([sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--find-links", folder / "wheels", "-r",
                           folder / "lock.txt", "--target", tmp_path / "site", "--platform", "manylinux_2_31_x86_64",
                           "--python-version", "3.12", "--only-binary", ":all:"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {f.name for f in (tmp_path / "site").glob("*.py")} == {"engine.py", "part.py", "native.py"}


def test_second_build_needs_no_index_and_changes_no_byte(locked, index, tmp_path):
    folder, said = wheels.build(tmp_path / "out", locked, "someone", **QUIET), []
    before, times = contents(folder), [f.stat().st_mtime_ns for f in sorted(folder.rglob("*"))]
    for file in index.iterdir():
        file.unlink()
    assert wheels.build(tmp_path / "out", locked, "someone", said.append) == folder
    assert "unchanged" in said[1] and "3 wheels" in said[0] and "0.0 MB downloaded" in said[0] and len(said) == 2
    assert contents(folder) == before and [f.stat().st_mtime_ns for f in sorted(folder.rglob("*"))] == times
    elsewhere = wheels.build(tmp_path / "elsewhere", locked, "someone", **QUIET)
    assert contents(elsewhere) == before


def test_after_a_kill_a_partial_file_is_not_taken_and_a_whole_one_is_kept(locked, tmp_path):
    cache = tmp_path / "cache/wheels"
    whole = (cache / "part-1.5-py3-none-any.whl").read_bytes()
    (cache / "part-1.5-py3-none-any.whl").write_bytes(whole[:-100])
    (cache / ".part/wheels").mkdir(parents=True)
    (cache / ".part/wheels/engine-1.0-py3-none-any.whl").write_bytes(b"PK")
    said = []
    folder = wheels.build(tmp_path / "out", locked, "someone", said.append)
    assert (folder / "wheels/part-1.5-py3-none-any.whl").read_bytes() == whole
    assert said[0] == "2 of 3 wheels are there, 1 to download"
    assert {f.name for f in cache.iterdir()} - {".lock"} == {f.name for f in (folder / "wheels").iterdir()}


def test_a_download_that_breaks_off_goes_on_from_where_it_was(index, home, tmp_path):
    made = [make_wheel(index, f"part{i:02}") for i in range(10)]
    (home / "locks").mkdir()
    (home / "locks/small.txt").write_text(lock.render([lock.Pin(f.name[:6], "1.0", (sha256(f),)) for f in made], []))
    made[-1].unlink()
    assert "part09==1.0" in error_of(wheels.build, tmp_path / "out", profile(), "someone", **QUIET)
    make_wheel(index, "part09")
    said = []
    folder = wheels.build(tmp_path / "out", profile(), "someone", said.append)
    assert said[0] == "8 of 10 wheels are there, 2 to download" and len(list((folder / "wheels").iterdir())) == 10


def test_a_file_that_is_not_the_locked_one_is_refused(locked, index, tmp_path):
    make_wheel(index, "part", "1.5", requires=["something"])
    (tmp_path / "cache/wheels/part-1.5-py3-none-any.whl").unlink()
    message = error_of(wheels.build, tmp_path / "out", locked, "someone", **QUIET)
    assert "no wheels for Python 3.12 on x86_64-manylinux_2_35" in message and "part==1.5" in message and "HASHES" in message
    assert not (tmp_path / "out").exists()


def test_a_lock_that_would_not_work_makes_no_bundle(locked, tmp_path):
    message = error_of(wheels.build, tmp_path / "out", dataclasses.replace(locked, requirements=("engine>=2", "other")), **QUIET)
    assert message.startswith(f"{wheels.lock_file(locked)}: would not work: profile small wants engine>=2: there is 1.0, and 1 more")
    assert "upgrade" in message and not (tmp_path / "out").exists()


# What would not work


@pytest.fixture
def bare(home):
    return profile()


def test_an_unsatisfied_requirement_is_named(bare, tmp_path):
    made = [make_wheel(tmp_path, "engine", requires=["part>=2", "missing", "base<1"]), make_wheel(tmp_path, "part", "1.5")]
    assert wheels.faults(made, bare) == ["engine 1.0 wants base<1: there is 1.0", "engine 1.0 wants missing: there is none",
                                         "engine 1.0 wants part>=2: there is 1.5"]
    assert wheels.faults(made, bare, {"Missing": "3", "base": "0.9"}) == ["engine 1.0 wants part>=2: there is 1.5"]


def test_what_the_image_has_counts_unless_it_is_removed(bare, tmp_path):
    made = [make_wheel(tmp_path, "engine", requires=["base>=1"])]
    assert wheels.faults(made, bare) == []
    assert wheels.faults(made, dataclasses.replace(bare, remove=("base",))) == ["engine 1.0 wants base>=1: there is none"]
    assert wheels.faults(made, dataclasses.replace(bare, remove=("base",), skip=("base",))) == []


def test_markers_are_those_of_the_target(bare, tmp_path):
    here = [make_wheel(tmp_path, "engine", requires=[
        'arm; platform_machine == "aarch64"', 'windows; sys_platform == "win32"', 'future; python_version >= "3.99"'])]
    assert wheels.faults(here, bare) == []
    arm = dataclasses.replace(bare, platform="aarch64-manylinux_2_35")
    assert wheels.faults(here, arm) == ["engine 1.0 wants arm: there is none"]
    assert wheels.faults(here, dataclasses.replace(bare, python="3.99")) == ["engine 1.0 wants future: there is none"]
    linux = ['cuda; platform_system == "Linux" and sys_platform == "linux" and platform_python_implementation == "CPython"']  # as torch's
    assert wheels.faults([make_wheel(tmp_path / "linux", "engine", requires=linux)], bare) == ["engine 1.0 wants cuda: there is none"]


def test_extras_count_where_somebody_asks_for_them(bare, tmp_path):
    made = [make_wheel(tmp_path, "engine", requires=['fast; extra == "speed"', "base"], extra="speed")]
    assert wheels.faults(made, bare) == []
    made.append(make_wheel(tmp_path, "user", requires=["engine[speed]"]))
    assert wheels.faults(made, bare) == ["engine 1.0 wants fast: there is none"]


@pytest.mark.parametrize("tag, fits", [
    ("cp312-cp312-manylinux_2_35_x86_64", True), ("cp38-abi3-manylinux_2_31_x86_64", True), ("cp312-cp312-manylinux2014_x86_64", True),
    ("py3-none-manylinux1_x86_64", True), ("py3-none-manylinux2010_x86_64", True), ("cp312-cp312-linux_x86_64", True),
    ("cp311-cp311-manylinux_2_17_x86_64", False), ("cp312-cp312-manylinux_2_36_x86_64", False),
    ("cp312-cp312-manylinux_2_17_aarch64", False), ("cp313-abi3-manylinux_2_17_x86_64", False), ("cp312-cp312-macosx_11_0_arm64", False)])
def test_tags_that_do_not_fit_the_target_are_a_fault(bare, tmp_path, tag, fits):
    wheel = make_wheel(tmp_path, "native", tag=tag)
    said = [] if fits else [f"{wheel.name}: its tags do not fit Python 3.12 on x86_64-manylinux_2_35"]
    assert wheels.faults([wheel], bare) == said


def test_another_pythons_wheel_a_second_version_and_half_a_wheel_are_faults(bare, tmp_path):
    made = [make_wheel(tmp_path, "engine", python=">=3.13"), make_wheel(tmp_path, "part", "1"), make_wheel(tmp_path, "part", "2")]
    half = tmp_path / "half-1.0-py3-none-any.whl"
    half.write_bytes(made[0].read_bytes()[:80])
    broken, engine, second = wheels.faults([*made, half], bare)
    assert engine == f"{made[0].name}: is for Python >=3.13, not 3.12.0"
    assert broken.startswith(f"{half}: not a wheel that can be read")
    assert second == f"{made[2].name}: {made[1].name} is there too: keep one of them"


# Locks


def test_differing_names_what_a_session_must_install():
    text = lock.render([lock.Pin("torch", "2.10.0"), lock.Pin("typing-extensions", "4.15.0", ("ab",)), lock.Pin("vllm", "0.19.1")], ["x"])
    there = {"Torch": "2.10.0+cu128", "typing_extensions": "4.14", "numpy": "2.0.2"}
    assert lock.differing(text, there) == ["typing-extensions==4.15.0 --hash=sha256:ab", "vllm==0.19.1"]
    assert lock.differing(text, there | {"typing.extensions": "4.15.0", "vllm": "0.19.1"}) == []
    assert lock.differing(text, there | {"vllm": "built by hand"})[-1] == "vllm==0.19.1"


@pytest.mark.parametrize("line, said", [
    ("torch>=2", "'torch>=2' is no pin"), ("torch", "'torch' is no pin"), ("torch==2.*", "is no pin"),
    ("torch==2; python_version >= '3'", "is no pin"),
    ("-e .", "is no requirement"), ("torch==2\nTorch==3", "torch is pinned twice")])
def test_a_line_that_is_no_pin_is_named(line, said):
    message = error_of(lock.parse, f"# a lock\n{line}\n", "locks/x.txt")
    assert message.startswith("locks/x.txt: ") and said in message


@pytest.mark.parametrize("name", [name for name in profiles.names() if profiles.load(name).python])
def test_committed_lock_goes_with_its_profile(name):
    profile = profiles.load(name)
    text = wheels.lock_file(profile).read_text()
    pins = {pin.name: pin for pin in lock.parse(text, name)}
    image = profiles.installed(profile)
    there = image | {pin.name: pin.version for pin in pins.values()}
    assert all(len(pin.hashes) == 1 and re.fullmatch("[0-9a-f]{64}", pin.hashes[0]) for pin in pins.values())
    wanted = {r: there[canonicalize_name(r.name)] for r in check.wanted(profile)}
    assert [r for r, version in wanted.items() if not r.specifier.contains(version, prereleases=True)] == []
    assert [pin for pin in pins.values() if image.get(pin.name) == pin.version] == []  # what is there is not brought again
    running = {"ipykernel", "ipython", "jupyter-client", "pyzmq", "tornado", "traitlets"}
    assert not running & set(pins)  # the kernel that runs the notebook
    assert "torchao" not in there and lock.differing(text, there) == []


# Resolving


def test_uv_keeps_the_images_versions_and_brings_only_what_is_missing(index, home, tmp_path):
    pytest.importorskip("uv")
    for version in ("1.0", "2.0"):
        make_wheel(index, "base", version)
        make_wheel(index, "part", version, tag="cp312-cp312-manylinux_2_35_x86_64")
    make_wheel(index, "part", "3.0", tag="cp312-cp312-manylinux_2_36_x86_64")
    make_wheel(index, "engine", requires=["base", "part", "unwanted", 'arm; platform_machine == "aarch64"'])
    asked = profile("engine", skip=("unwanted",))
    folder = wheels.build(tmp_path / "out", asked, "someone", **QUIET)
    assert {f.name for f in (folder / "wheels").iterdir()} == {"engine-1.0-py3-none-any.whl",
                                                               "part-2.0-cp312-cp312-manylinux_2_35_x86_64.whl"}
    assert wheels.lock_file(asked).read_bytes() == (folder / "lock.txt").read_bytes()
    make_wheel(index, "engine", "1.1", requires=["base>=2"])
    assert (wheels.build(tmp_path / "out", asked, "someone", **QUIET) / "wheels/engine-1.0-py3-none-any.whl").is_file()
    folder = wheels.build(tmp_path / "out", asked, "someone", upgrade=True, **QUIET)
    assert {f.name for f in (folder / "wheels").iterdir()} == {"engine-1.1-py3-none-any.whl", "base-2.0-py3-none-any.whl"}


def test_requirements_that_cannot_be_met_are_told_in_one_line(index, home):
    pytest.importorskip("uv")
    message = error_of(resolve.resolve, profile("nowhere==1"))
    assert message.startswith("profile small: its requirements cannot be resolved") and "nowhere" in message


def test_without_uv_the_mend_is_named(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "uv", None)  # as find_spec reports a module that is not there
    assert error_of(resolve.resolve, profile("engine")).endswith("pip install 'uv==0.13.*'")


def test_a_complete_lock_is_taken_as_it_is_with_what_its_own_requirements_need_here(index, home, tmp_path):
    for name, version, requires in [("torch", "2.1", ["sums"]), ("sums", "1", []), ("part", "1", ["left-out"]), ("part", "2", [])]:
        make_wheel(index, name, version, requires)
    (home / "complete.txt").write_text('part==1\nother==1; sys_platform == "win32"\n')
    here = profile("torch==2.1", python="", platform="", pinned=str(home / "complete.txt"), skip=("left-out",))
    here = dataclasses.replace(here, image="")
    folder = wheels.build(tmp_path / "out", here, "someone", **QUIET)
    assert {f.name.split("-py3")[0] for f in (folder / "wheels").iterdir()} == {"torch-2.1", "sums-1", "part-1"}
    for file in index.iterdir():
        file.unlink()
    said = []
    wheels.build(tmp_path / "out", here, "someone", said.append)
    assert "unchanged" in said[-1]
