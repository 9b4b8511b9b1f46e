"""build_kernel.py as a user calls it, in a clone with small wheels and weights: what it makes, says, refuses and pushes.

    python -m pytest tests/test_build_kernel.py
"""

import json
import shutil
import subprocess
import sys

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file

import build_kernel
import clone
from arc_kernel import bundle
from arc_kernel.checkpoint import load_model
from arc_kernel.kaggle import datasets, metadata, profiles
from models import tiny_model

COMMANDS = ("all", "code", "weights", "adapter", "wheels", "notebook", "check", "push")
CODE, WEIGHTS, WHEELS, NOTEBOOK = "arc-kernel-code", "arc-kernel-smollm2-135m", "arc-kernel-wheels-kaggle-t4", "arc-kernel-notebook"
IMAGE = "example/python@sha256:" + "0" * 64


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return clone.make(tmp_path_factory.mktemp("build") / "clone")


@pytest.fixture(scope="module")
def kernel(repository):
    """Run build_kernel.py in the clone; (exit status, lines of stdout, lines of stderr)."""
    def run(*arguments):
        environment = clone.environment(repository) | {"HTTPS_PROXY": "http://127.0.0.1:9"}  # nobody is there
        done = subprocess.run([sys.executable, "build_kernel.py", *map(str, arguments)], capture_output=True, text=True,
                              cwd=repository, env=environment)
        return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()
    return run


@pytest.fixture(scope="module")
def first(kernel):
    """What the first build of everything said."""
    code, said, errors = kernel("--username", "someone")
    assert (code, errors) == (0, [])
    return said


@pytest.fixture(scope="module")
def built(first, repository):
    return repository / "kaggle_datasets"


@pytest.fixture
def copy(built, tmp_path):
    """All that was built, to do harm to."""
    return shutil.copytree(built, tmp_path / "out")


def contents(folder):
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def kernel_metadata(out):
    return json.loads((out / NOTEBOOK / "kernel-metadata.json").read_text())


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# What is made


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        build_kernel.main([command, "--help"] if command else ["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    expected = {"": COMMANDS, "all": ("--profile", "--model", "--adapter", "--docker-image", "--username", "--licence"),
                "adapter": ("--adapter-licence", "--adapter-source"), "wheels": ("--profile", "--upgrade"),
                "notebook": ("--profile", "--model", "--docker-image"), "push": ("--dry-run", "--message")}
    assert all(word in said for word in (*expected.get(command, ()), *(("--out", "--quiet") if command else ())))


def test_all_makes_what_the_notebook_names_and_nothing_else(first, built):
    assert {f.name for f in built.iterdir() if f.is_dir()} == {CODE, WEIGHTS, WHEELS, NOTEBOOK}
    assert all(any(name in line and ", built" in line for line in first) for name in (CODE, WEIGHTS, WHEELS, NOTEBOOK))
    assert first[-1] == "next: python build_kernel.py check, then push"
    assert set(contents(built / NOTEBOOK)) == {"submission.ipynb", "kernel-metadata.json"}
    assert kernel_metadata(built)["dataset_sources"] == [f"someone/{name}" for name in (WHEELS, WEIGHTS, CODE)]
    found = bundle.find_bundles(built)
    assert {kind: found[kind].folder.name for kind in found} == {"code": CODE, "weights": WEIGHTS, "wheels": WHEELS}
    for name in (CODE, WEIGHTS, WHEELS):
        assert json.loads((built / name / "dataset-metadata.json").read_text())["id"] == f"someone/{name}"
    assert len(list((built / WHEELS / "wheels").glob("*.whl"))) > 50


def test_second_build_says_unchanged_and_changes_no_byte(kernel, built):
    state = lambda: [(f, f.stat().st_mtime_ns, f.stat().st_ino, f.read_bytes()) for f in sorted(built.rglob("*")) if f.is_file()]
    before = state()
    code, said, _ = kernel("--username", "someone")
    about = [line for line in said if line.startswith("kaggle_datasets")]
    assert code == 0 and len(about) == 4 and all("unchanged" in line for line in about)
    assert state() == before


def test_the_same_clone_gives_the_same_bytes_elsewhere(kernel, built, tmp_path):
    code, said, errors = kernel("--username", "someone", "--out", tmp_path / "out", "--quiet")
    assert (code, said, errors) == (0, [], [])
    assert contents(tmp_path / "out") == {name: data for name, data in contents(built).items() if "/" in name}


@pytest.mark.parametrize("command, name", [("code", CODE), ("weights", WEIGHTS), ("wheels", WHEELS), ("notebook", NOTEBOOK)])
def test_a_part_alone_is_that_part_of_all(kernel, built, tmp_path, command, name):
    code, _, errors = kernel(command, "--username", "someone", "--out", tmp_path / "out")
    assert (code, errors) == (0, [])
    assert [f.name for f in (tmp_path / "out").iterdir()] == [name]
    assert contents(tmp_path / "out" / name) == contents(built / name)


def test_what_editors_leave_in_the_package_is_not_part_of_it(kernel, repository, built, tmp_path):
    lock, folder = repository / "arc_kernel/.#run.py", repository / "arc_kernel/notes.txt"
    lock.symlink_to("me@here.1234:5678")  # Emacs's, to nowhere
    folder.mkdir()
    code, _, errors = kernel("code", "--username", "someone", "--out", tmp_path)
    lock.unlink()
    folder.rmdir()
    assert (code, errors) == (0, []) and contents(tmp_path / CODE) == contents(built / CODE)


def test_an_adapter_becomes_a_dataset_that_the_notebook_names(kernel, tmp_path):
    adapter, out = clone.small_adapter(tmp_path / "Trained_1" / "adapter", "---\nbase_model: /home/me/model\n---\n"), tmp_path / "out"
    code, _, errors = kernel("--username", "someone", "--out", out, "--adapter", adapter)
    assert (code, errors) == (0, [])
    name = "arc-kernel-adapter-trained-1"  # after the run: `finetune` calls each adapter "adapter"
    assert name == datasets.trained_name("adapter", "Trained_1")
    assert kernel_metadata(out)["dataset_sources"] == [f"someone/{n}" for n in (WHEELS, WEIGHTS, name, CODE)]
    files = bundle.find_bundles(out)["adapter"].manifest["files"]
    assert set(files) == {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert load_file(out / name / "adapter/adapter_model.safetensors").keys() == {"lora_A"}
    code, _, errors = kernel("check", "--out", out)  # nobody has said whose it is
    assert code == 1 and len(errors) == 2 and "--adapter-licence" in errors[0] and "--adapter-source" in errors[1]
    code, _, errors = kernel("adapter", "--adapter", adapter, "--adapter-licence", "apache-2.0", "--adapter-source", "my own tasks",
                             "--username", "someone", "--out", out)
    assert (code, errors) == (0, [])
    written = json.loads((out / name / "dataset-metadata.json").read_text())
    assert written["licenses"] == [{"name": "apache-2.0"}] and "Trained on: my own tasks." in written["description"]
    assert kernel("check", "--out", out)[0] == 0 and (out / name / "LICENSE").is_file()


def test_the_image_is_the_profiles_or_the_one_asked_for(kernel, built, tmp_path):
    assert kernel_metadata(built)["docker_image"] == profiles.load("kaggle-t4").docker_image
    assert kernel("notebook", "--docker-image", IMAGE, "--username", "someone", "--out", tmp_path)[0] == 0
    assert kernel_metadata(tmp_path)["docker_image"] == IMAGE and "docker_image_pinning_type" not in kernel_metadata(tmp_path)
    assert metadata.faults(tmp_path / NOTEBOOK) == []


def test_another_profile_is_another_machine_and_other_wheels(kernel, tmp_path):
    assert kernel("notebook", "--profile", "kaggle-l4", "--username", "someone", "--out", tmp_path)[0] == 0
    written = kernel_metadata(tmp_path)
    assert written["machine_shape"] == "NvidiaL4" and written["dataset_sources"][0] == "someone/arc-kernel-wheels-kaggle-l4"


# What is refused


@pytest.mark.parametrize("arguments, said", [
    (["--profile", "kaggle-p100"], "profile kaggle-p100: no such profile: choose one of kaggle-t4, "),
    (["wheels", "--profile", "kaggle-p100"], "profile kaggle-p100: no such profile"),
    (["--username", "two words"], "--username: 'two words': give the name"),
    (["notebook", "--username", "a/b"], "--username: 'a/b': give the name"),
    (["--docker-image", "example/python:latest"], "--docker-image: 'example/python:latest' is not pinned: give"),
    (["weights", "--model", "nowhere"], "nowhere: no such model folder: give a folder with safetensors, or smollm2-135m"),
    (["--model", "nowhere"], "nowhere: no such model folder"),
    (["notebook", "--model", "x" * 40], "its name makes no Kaggle dataset id (arc-kernel-xx"),
    (["notebook", "--model", "wheels-kaggle-t4"], "its name makes no Kaggle dataset id (arc-kernel-wheels-kaggle-t4): rename the folder"),
    (["adapter", "--adapter", "nowhere"], "nowhere: no adapter_config.json: give the folder of a peft LoRA"),
    (["notebook", "--adapter", "x" * 32], "its name makes no Kaggle dataset id (arc-kernel-adapter-xx"),
    (["check"], "out/arc-kernel-notebook: no such folder: build it first (python build_kernel.py)"),
    (["push"], "out/arc-kernel-notebook: no such folder: build it first (python build_kernel.py)"),
])
def test_an_error_is_one_line_and_makes_nothing(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert build_kernel.main([*arguments, "--out", "out"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and printed.err.startswith("error: ") and said in printed.err
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_another_base_is_refused_before_anything_is_made(model_folder, tmp_path, capsys):
    base = load_model(tiny_model(model_folder, tmp_path / "tiny"), "float32", "cpu")
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "trained")
    capsys.readouterr()
    assert build_kernel.main(["--adapter", str(tmp_path / "trained"), "--username", "someone", "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and f"{tmp_path / 'trained'}: " in printed.err and "smollm2-135m: the adapter is for" in printed.err
    assert printed.out == "" and not (tmp_path / "out").exists()


def test_an_unknown_command_is_refused(kernel):
    code, _, errors = kernel("upload")
    assert code == 2 and "invalid choice: 'upload'" in errors[-1]


def test_check_finds_no_fault_in_what_was_built(kernel, built):
    code, said, errors = kernel("check")
    assert (code, errors) == (0, []) and said == [f"kaggle_datasets/{name}: no fault" for name in (WHEELS, WEIGHTS, CODE, NOTEBOOK)]


def test_check_names_every_fault_of_every_folder(kernel, copy):
    (copy / CODE / "kaggle.json").write_text("{}")
    weights = copy / WEIGHTS / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    next((copy / WHEELS / "wheels").glob("vllm-*")).unlink()
    change(copy / NOTEBOOK / "kernel-metadata.json", docker_image="example/python:latest", enable_internet=True)
    code, said, errors = kernel("check", "--out", copy)
    assert (code, said) == (1, []) and all(line.startswith(f"error: {copy}/") and line.count(": ") >= 3 for line in errors)
    expected = ((WHEELS, "wheels/vllm-0.19.1-py3-none-any.whl is in manifest.json but not in the folder"),
                (WEIGHTS, "model/model.safetensors has changed bytes"), (CODE, "kaggle.json is not in manifest.json"),
                (CODE, "Kaggle API key"), (NOTEBOOK, "is not pinned"), (NOTEBOOK, "enable_internet is true"))
    assert len(errors) == len(expected)
    assert all(any(f"/{name}" in line and words in line for line in errors) for name, words in expected)


def test_check_names_wheels_that_would_not_work(kernel, copy):
    folder = copy / WHEELS
    manifest = json.loads((folder / "manifest.json").read_text())
    vllm = next((folder / "wheels").glob("vllm-*"))
    vllm.unlink()
    change(folder / "manifest.json", files={name: f for name, f in manifest["files"].items() if name != f"wheels/{vllm.name}"})
    code, _, errors = kernel("check", "--out", copy)
    wants = "error: {}: profile kaggle-t4 wants vllm{}: there is none: make it again with upgrade"
    assert code == 1 and [line.rpartition(" (")[0] for line in errors] == [wants.format(folder, v) for v in ("==0.19.1", ">=0.11.2")]


def test_check_names_what_the_session_would_refuse(kernel, copy):
    assert kernel("notebook", "--username", "someone", "--profile", "kaggle-l4", "--out", copy)[0] == 0
    path = copy / NOTEBOOK / "kernel-metadata.json"
    change(path, dataset_sources=[f"someone/{name}" for name in (WHEELS, CODE)], machine_shape="NvidiaTeslaT4")
    code, _, errors = kernel("check", "--out", copy)
    assert code == 1 and errors == [
        f"error: {path}: machine_shape is 'NvidiaTeslaT4', that of the notebook's profile kaggle-l4 is 'NvidiaL4': "
        "build all with one --profile",
        f"error: {path}: its wheels are those of profile kaggle-t4, the notebook's is kaggle-l4: build all with one --profile",
        f"error: {path}: no dataset of weights among its dataset_sources: build the notebook again"]


def test_a_dataset_of_another_user_is_named_by_check_and_push(kernel, copy):
    assert kernel("code", "--username", "another", "--out", copy)[0] == 0
    code, _, errors = kernel("check", "--out", copy)
    assert code == 1 and len(errors) == 1
    assert "its id is another/arc-kernel-code, the notebook names someone/arc-kernel-code" in errors[0]
    code, said, errors = kernel("push", "--dry-run", "--out", copy)
    assert code == 1 and said == [] and len(errors) == 1 and "another/arc-kernel-code is not among its dataset_sources" in errors[0]


def test_a_dataset_that_was_not_built_is_named(kernel, copy):
    shutil.rmtree(copy / WHEELS)
    for command in (["check"], ["push", "--dry-run"]):
        code, _, errors = kernel(*command, "--out", copy)
        assert code == 1 and errors == [f"error: {copy / WHEELS}: no such folder: build it first (python build_kernel.py)"]


def test_a_dataset_of_somebody_else_is_attached_and_not_looked_for_here(kernel, copy):
    path = copy / NOTEBOOK / "kernel-metadata.json"
    change(path, dataset_sources=[*kernel_metadata(copy)["dataset_sources"], "another/their-dataset"])
    assert kernel("check", "--out", copy)[0] == 0
    code, said, errors = kernel("push", "--dry-run", "--out", copy)
    assert (code, errors) == (0, []) and not any("their-dataset" in line for line in said)


def test_upgrade_resolves_again_and_leaves_the_lock_where_that_fails(kernel, repository, tmp_path):
    """Without an index, or without uv, it can only fail; test_wheels has one that goes well."""
    before = contents(repository / "arc_kernel/kaggle/locks")
    code, said, errors = kernel("wheels", "--upgrade", "--out", tmp_path)
    assert code == 1 and said == ["profile kaggle-t4: resolving for Python 3.12 on x86_64-manylinux_2_35"]
    assert len(errors) == 1 and errors[0].startswith("error: profile kaggle-t4: ") and "resolv" in errors[0]
    assert contents(repository / "arc_kernel/kaggle/locks") == before and not list(tmp_path.iterdir())


def test_without_a_user_name_nothing_is_pushed(kernel, tmp_path):
    code, said, _ = kernel("--out", tmp_path)
    assert code == 0 and said[-1].startswith("note: this can be tried here, not pushed: for that build again with --username <")
    code, said, errors = kernel("push", "--dry-run", "--out", tmp_path)
    assert code == 1 and said == [] and len(errors) == 1 and "build again with --username <your Kaggle user name>" in errors[0]


# What is pushed


def test_dry_run_prints_the_commands_and_does_nothing(kernel, repository, copy):
    (copy / "arc-kernel-another-model").mkdir()  # not of this notebook
    before = contents(copy), contents(clone.cache_of(repository))
    code, said, errors = kernel("push", "--dry-run", "--message", "more views", "--out", copy)
    assert (code, errors) == (0, [])
    expected = []
    for name in (WHEELS, WEIGHTS, CODE):
        status = f"kaggle datasets status someone/{name} --format 'json(status,current_version_number)'"
        expected += [status, f"  if it is there: kaggle datasets version -p {copy / name} --dir-mode zip -m 'more views'",
                     f"  if it is not:   kaggle datasets create -p {copy / name} --dir-mode zip", f"  until ready:    {status}"]
    assert said == [*expected, f"kaggle kernels push -p {copy / NOTEBOOK}"]
    assert (contents(copy), contents(clone.cache_of(repository))) == before
