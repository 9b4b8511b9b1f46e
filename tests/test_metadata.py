"""Kaggle metadata: what is written has no fault, and each fault of a folder is named in one line with its mend.

    python -m pytest tests/test_metadata.py
"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from arc_kernel.errors import ArcKernelError
from arc_kernel.kaggle import datasets, metadata, profiles, templates
from models import tiny_model

HOME = Path(__file__).resolve().parent.parent
IMAGE = "example/python@sha256:" + "0" * 64
PROFILE = dataclasses.replace(profiles.load("kaggle-t4"), docker_image=IMAGE)
ENTRY = {"sha256": "", "bytes": 1}  # of a file in a manifest
HEX = "0123456789abcdef" * 2  # as long as a Kaggle key


@pytest.fixture
def code(tmp_path):
    return datasets.build_code(tmp_path, "someone", lambda line: None)


@pytest.fixture
def kernel(tmp_path):
    return metadata.write_kernel(tmp_path / "kernel", HOME / "notebooks/submission.ipynb", PROFILE, "someone",
                                 ["someone/arc-kernel-code", "someone/arc-kernel-smollm2-135m"])


def change(path: Path, **fields) -> None:
    """Set fields of a JSON file; None removes one."""
    data = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def only_fault(folder: Path) -> str:
    found = metadata.faults(folder)
    assert len(found) == 1 and "\n" not in found[0]
    assert found[0].count(": ") >= 2  # where: what is wrong: what to do
    with pytest.raises(ArcKernelError) as caught:
        metadata.check(folder)
    assert str(caught.value) == found[0]
    return found[0]


def test_what_is_written_has_no_fault(code, kernel):
    assert metadata.faults(code) == metadata.faults(kernel) == []
    metadata.check(code)


def test_kernel_is_the_profiles_machine(kernel):
    written = json.loads((kernel / "kernel-metadata.json").read_text())
    assert written["id"] == "someone/arc-kernel-submission" and written["code_file"] == "submission.ipynb"
    assert (kernel / "submission.ipynb").read_bytes() == (HOME / "notebooks/submission.ipynb").read_bytes()
    assert (written["machine_shape"], written["enable_gpu"], written["docker_image"]) == ("NvidiaTeslaT4", True, IMAGE)
    assert (written["enable_internet"], written["is_private"]) == (False, True)
    assert written["competition_sources"] == [PROFILE.competition]


def test_without_an_image_the_kernel_keeps_that_of_its_first_push(tmp_path):
    folder = metadata.write_kernel(tmp_path, HOME / "notebooks/submission.ipynb", dataclasses.replace(PROFILE, docker_image=""), "someone",
                                   ["someone/arc-kernel-code"])
    written = json.loads((folder / "kernel-metadata.json").read_text())
    assert written["docker_image_pinning_type"] == "original" and "docker_image" not in written
    assert metadata.faults(folder) == []


def test_image_with_more_than_its_digest_is_not_pinned(tmp_path):
    longer = dataclasses.replace(PROFILE, docker_image=IMAGE + "0")
    with pytest.raises(ArcKernelError, match="is not pinned"):
        metadata.write_kernel(tmp_path, HOME / "notebooks/submission.ipynb", longer, "someone", ["someone/arc-kernel-code"])


def test_kernel_that_is_there_already_is_left_alone(tmp_path):
    said, seen = [], []
    for _ in range(2):
        folder = metadata.write_kernel(tmp_path / "kernel", HOME / "notebooks/submission.ipynb", PROFILE, "someone",
                                       ["someone/arc-kernel-code"], said.append)
        seen.append({f: f.stat().st_mtime_ns for f in folder.iterdir()})
    assert [line.rpartition(" ")[2] for line in said] == ["built", "unchanged"] and seen[0] == seen[1]


def test_a_machine_without_a_gpu_has_no_shape(tmp_path):
    cpu = dataclasses.replace(PROFILE, accelerator="", gpus=0)
    folder = metadata.write_kernel(tmp_path, HOME / "notebooks/submission.ipynb", cpu, "someone", ["someone/arc-kernel-code"])
    assert metadata.faults(folder) == [] and not json.loads((folder / "kernel-metadata.json").read_text())["enable_gpu"]


def test_the_notebook_runs_with_the_profile_it_is_built_for(tmp_path):
    other = profiles.load("kaggle-t4-vllm-0.11")
    folder = metadata.write_kernel(tmp_path, HOME / "notebooks/submission.ipynb", other, "someone", ["someone/arc-kernel-code"])
    cells, source = (json.loads(f.read_text())["cells"] for f in (folder / "submission.ipynb", HOME / "notebooks/submission.ipynb"))
    lines = [line for cell in cells for line in cell["source"] if line.startswith("profile = ")]
    assert len(lines) == 1 and lines[0].startswith('profile = "kaggle-t4-vllm-0.11"  # ')
    changed = [(a, b) for one, two in zip(cells, source) for a, b in zip(one["source"], two["source"]) if a != b]
    assert len(changed) == 1 and metadata.faults(folder) == []


def test_a_missing_notebook_is_named(tmp_path):
    with pytest.raises(ArcKernelError, match="nowhere.ipynb: No such file"):
        metadata.write_kernel(tmp_path, tmp_path / "nowhere.ipynb", PROFILE, "someone", [])


@pytest.mark.parametrize("kind", ["code", "weights", "adapter", "wheels"])
def test_each_kind_has_a_template_kaggle_takes(kind, tmp_path):
    filled = templates.fill(kind, f"arc-kernel-{kind}", "someone", templates.SMOLLM2)
    (tmp_path / "dataset-metadata.json").write_text(json.dumps(filled))
    (tmp_path / "a.txt").write_text("a")
    manifest = {"arc_kernel_bundle": kind, "name": f"arc-kernel-{kind}", "files": {"a.txt": ENTRY}}
    for of in ("another", ["code"]):  # none that the notebook would find
        (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"arc_kernel_bundle": of}))
        assert "manifest.json is missing or damaged" in metadata.faults(tmp_path)[0]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert metadata.faults(tmp_path) == []
    assert filled["subtitle"] and "licence" in filled["description"].lower()


@pytest.mark.parametrize("fields, words", [
    ({"title": None}, "no title"),
    ({"title": "short"}, "title has 5 characters"),
    ({"title": "x" * 51}, "title has 51 characters"),
    ({"title": "INSERT_TITLE_HERE"}, "is a template's"),
    ({"id": None}, "is not <user>/<slug>"),
    ({"id": "INSERT_USERNAME_HERE/arc-kernel-code"}, "names no user"),
    ({"licenses": []}, "exactly one licence"),
    ({"licenses": [{"name": "other"}, {"name": "apache-2.0"}]}, "exactly one licence"),
    ({"licenses": [{"name": "MIT"}]}, "knows no licence 'MIT'"),
    ({"licenses": [{"name": "unknown"}]}, "licence unknown"),
    ({"description": "Some files."}, "which the description must name"),
    ({"subtitle": "too short"}, "subtitle has 9 characters"),
    ({"subtitle": "x" * 81}, "subtitle has 81 characters"),
    ({"description": "Licence: mit. Source: not stated."}, "source not stated"),
    ({"licenses": [{"name": "apache-2.0"}], "description": None}, "no description"),
])
def test_faults_of_dataset_metadata(code, fields, words):
    change(code / "dataset-metadata.json", **fields)
    assert words in only_fault(code)


@pytest.mark.parametrize("slug, words", [("Arc-Kernel", "lowercase letters"), ("two--hyphens", "single hyphens"),
                                         ("code1", "has 5 characters"), ("x" * 51, "has 51 characters")])
def test_faults_of_a_slug(code, slug, words):
    change(code / "dataset-metadata.json", id=f"someone/{slug}")
    change(code / "manifest.json", name=slug)
    assert words in only_fault(code)


def test_faults_of_what_a_dataset_holds(code):
    change(code / "dataset-metadata.json", id="someone/another-name")
    assert "does not end in arc-kernel-code" in only_fault(code)
    change(code / "dataset-metadata.json", id="someone/arc-kernel-code")
    (code / "notes.txt").write_text("mine")
    assert "notes.txt is not in manifest.json" in only_fault(code)
    (code / "notes.txt").unlink()
    (code / "requirements.txt").rename(code.parent / "aside")
    assert "requirements.txt is in manifest.json but not in the folder" in only_fault(code)
    (code.parent / "aside").rename(code / "requirements.txt")
    files = json.loads((code / "manifest.json").read_text())["files"]
    for name, words in ((".cache/a.txt", "Kaggle's client leaves out"), ("a.tar.gz", "would be unpacked by Kaggle")):
        (code / name).parent.mkdir(exist_ok=True)
        (code / name).write_text("a")
        change(code / "manifest.json", files=files | {name: ENTRY})
        assert words in only_fault(code)
        (code / name).unlink()
    change(code / "manifest.json", files=files)
    (code / "link").symlink_to(code / "arc_kernel")
    assert f"{code / 'link'}: a link to a folder" in only_fault(code)
    (code / "link").unlink()
    for damaged in (list(files), files | {"a": None}):
        change(code / "manifest.json", files=damaged)
        assert "manifest.json is missing or damaged" in only_fault(code)
    (code / "manifest.json").unlink()
    assert "manifest.json is missing" in only_fault(code)


@pytest.mark.parametrize("name, fault", [("deep/a.zip", ""), ("a.zip", "unpacked by Kaggle"), ("deep/.git/a", "leaves out")])
def test_archives_arrive_as_they_are_in_folders_only_and_what_the_client_leaves_out_never(code, name, fault):
    (code / name).parent.mkdir(parents=True, exist_ok=True)
    (code / name).write_text("a")
    change(code / "manifest.json", files=json.loads((code / "manifest.json").read_text())["files"] | {name: ENTRY})
    found = [line for line in metadata.faults(code) if "version control" not in line]
    assert len(found) == bool(fault) and fault in "".join(found)


@pytest.mark.parametrize("fields, words", [
    ({"title": None}, "no title"),
    ({"id": "submission"}, "is not <user>/<slug>"),
    ({"title": "arc-kernel two"}, "set id to <user>/arc-kernel-two"),
    ({"code_file": None}, "is no notebook"),
    ({"code_file": "run.py"}, "is no notebook"),
    ({"code_file": "other.ipynb"}, "code_file other.ipynb is not in the folder"),
    ({"language": "r"}, "language 'r'"),
    ({"kernel_type": "script"}, "kernel_type 'script'"),
    ({"is_private": None}, "is_private is not true or false"),
    ({"enable_internet": None}, "absent means true"),
    ({"enable_internet": "no"}, "absent means true"),
    ({"enable_internet": "true"}, "a code competition does not take"),
    ({"machine_shape": ""}, "Kaggle chooses the GPU"),
    ({"machine_shape": "NvidiaTeslaP100"}, "retired or unknown"),
    ({"enable_gpu": False}, "enable_gpu is false but"),
    ({"docker_image": None}, "is not pinned"),
    ({"docker_image": "example/python:latest"}, "is not pinned"),
    ({"docker_image": None, "docker_image_pinning_type": "latest"}, "is not pinned"),
    ({"docker_image_pinning_type": "original"}, "is not pinned"),
    ({"docker_image": "", "docker_image_pinning_type": "original"}, "is not pinned"),
    ({"dataset_sources": []}, "no dataset_sources"),
    ({"dataset_sources": ["arc-kernel-code"]}, "is not <user>/<slug>"),
    ({"competition_sources": []}, "no competition_sources"),
    ({"competition_sources": ["https://example.org/arc"]}, "is no slug"),
])
def test_faults_of_kernel_metadata(kernel, fields, words):
    change(kernel / "kernel-metadata.json", **fields)
    assert words in only_fault(kernel)


def test_version_of_a_dataset_may_be_named_and_further_faults_are_counted(kernel):
    change(kernel / "kernel-metadata.json", dataset_sources=["someone/arc-kernel-code/3"])
    assert metadata.faults(kernel) == []
    change(kernel / "kernel-metadata.json", language="r", kernel_type="script", competition_sources=[])
    with pytest.raises(ArcKernelError, match=r"language 'r'.* \(and 2 more faults\)$"):
        metadata.check(kernel)


def test_folders_that_are_none(tmp_path):
    assert "no such folder" in only_fault(tmp_path / "nowhere")
    assert "neither dataset-metadata.json nor kernel-metadata.json" in only_fault(tmp_path)
    (tmp_path / "dataset-metadata.json").write_text('{"title": ')
    assert "not JSON" in only_fault(tmp_path)
    (tmp_path / "dataset-metadata.json").write_text("[" * 100_000)
    assert "not JSON" in only_fault(tmp_path)
    (tmp_path / "dataset-metadata.json").write_text("[]")
    assert "not a JSON object" in only_fault(tmp_path)


@pytest.mark.parametrize("name, words", [
    ("kaggle.json", "Kaggle API key"), ("Kaggle.JSON", "Kaggle API key"), ("access_token", "Kaggle access token"),
    ("access_token.txt", "Kaggle access token"), ("credentials.json", "OAuth"), ("prod.env", "environment file"),
    (".env", "environment file"), (".env.local", "environment file"), ("server.pem", "private key"), ("server.key", "private key"),
    ("id_ed25519", "SSH key"), ("id_rsa.pub", "SSH key"), (".netrc", "password"),
    (".git-credentials", "password"), (".pypirc", "password")])
def test_files_with_credentials_are_refused(kernel, name, words):
    (kernel / "deep").mkdir()
    (kernel / "deep" / name).write_text("x")
    assert only_fault(kernel).startswith(f"{kernel / 'deep' / name}: ") and words in only_fault(kernel)


@pytest.mark.parametrize("text, words", [
    (f"token = KGAT_{HEX}", "a Kaggle API token"), (f'{{"username": "a", "key": "{HEX}"}}', "a Kaggle API key"),
    (f"export KAGGLE_KEY={HEX}", "a Kaggle API key"), (f"login('hf_{'aB3' * 11}')", "a Hugging Face token"),
    (f'os.environ["KAGGLE_KEY"] = "{HEX}"', "a Kaggle API key"), (f'os.environ.setdefault("KAGGLE_KEY", "{HEX}")', "a Kaggle API key"),
    (f"os.environ['KAGGLE_KEY']='{HEX}'", "a Kaggle API key"), (f'kaggle_login(username="a", key="{HEX}")', "a Kaggle API key"),
    (f"%env KAGGLE_KEY {HEX}", "a Kaggle API key"), (f"ghp_{'aB3' * 12}", "a GitHub token"),
    (f"git clone https://github_pat_{'aB3_' * 20}@github.com/a/b", "a GitHub token"),
    (f'os.environ["WANDB_API_KEY"] = "{HEX}01234567"', "a Weights & Biases API key"),
    (f"export WANDB_API_KEY={HEX}01234567", "a Weights & Biases API key"),
    (f'wandb.login(key="{HEX}01234567")', "a Weights & Biases API key"),
    (f'api_key = "sk-{"aB3" * 8}"', "an API key"), (f"AKIA{'AB34' * 4}", "an API key"),
    (f"glpat-{'aB3_' * 5}", "an API key"), (f'api_key="{HEX}"', "a Kaggle API key"),
    ("-----BEGIN OPENSSH PRIVATE KEY-----", "a private key")])
@pytest.mark.parametrize("name", ["notes.py", "submission.ipynb"])
def test_text_that_looks_like_a_credential_is_refused(kernel, name, text, words):
    if name == "notes.py":
        (kernel / name).write_text(f"# mine\n{text}\n")
    else:
        notebook = json.loads((kernel / name).read_text())
        next(c for c in notebook["cells"] if c["cell_type"] == "markdown")["source"].append(f"\n\n{text}\n")
        (kernel / name).write_text(json.dumps(notebook))
    assert f"{name}: holds what looks like {words}" in only_fault(kernel)
    assert HEX not in only_fault(kernel)


@pytest.mark.parametrize("text", [f'"sha256": "{HEX}{HEX}"', f"image@sha256:{HEX}{HEX}", f'"key": "{HEX}{HEX}"',
                                  f'commit = "{HEX}01234567"', f'"cache_key": "{HEX}"', "KAGGLE_KEY=$KAGGLE_KEY", 'key = "value"',
                                  f"AKIA{'AB34' * 5}",
                                  "sk-learn-extra-helper-functions", "en-sk-opus-mt-tc-big-model-2023-01"])
def test_text_that_is_no_credential_is_left_alone(kernel, text):
    (kernel / "notes.py").write_text(text)
    assert metadata.faults(kernel) == []


def test_version_control_is_refused(kernel):
    (kernel / ".git/objects").mkdir(parents=True)
    assert only_fault(kernel).startswith(f"{kernel / '.git'}: version control")


@pytest.mark.parametrize("cell, top, words", [
    ({"outputs": [{"output_type": "stream", "name": "stdout", "text": "4"}]}, {}, "has outputs"),
    ({"execution_count": 4}, {}, "has execution counts"),
    ({}, {"kaggle": {"accelerator": "none"}}, "names a machine (metadata.kaggle)")])
def test_a_notebook_that_was_run_is_refused(kernel, cell, top, words):
    path = kernel / "submission.ipynb"
    notebook = json.loads(path.read_text())
    next(c for c in notebook["cells"] if c["cell_type"] == "code").update(cell)
    notebook["metadata"].update(top)
    path.write_text(json.dumps(notebook))
    assert words in only_fault(kernel)


@pytest.mark.parametrize("text", ["{}", "[]", "[" * 100_000, '{"cells": [], "metadata": 1}'])
def test_a_file_that_is_no_notebook_is_refused(kernel, text):
    (kernel / "submission.ipynb").write_text(text)
    assert "not a notebook" in only_fault(kernel)


@pytest.fixture(scope="module")
def model(model_folder, tmp_path_factory):
    return tiny_model(model_folder, tmp_path_factory.mktemp("model") / "model")


def weights(model, out, card="", origin=templates.Origin()):
    """The weights bundle of a copy of `model` with `card` as its README.md, and its metadata."""
    shutil.copytree(model, out / "tiny-llama")
    (out / "tiny-llama/README.md").write_text(card)
    folder = datasets.build_weights(out / "bundles", str(out / "tiny-llama"), "someone", lambda line: None, origin)
    return folder, json.loads((folder / "dataset-metadata.json").read_text())


def test_weights_state_the_licence_and_source_of_their_model_card(model, tmp_path):
    folder, written = weights(model, tmp_path, "---\nlicense: apache-2.0\nbase_model: some/model\n---\n# Tiny\n")
    assert written["licenses"] == [{"name": "apache-2.0"}] and metadata.faults(folder) == []
    assert "Source: some/model. Licence: apache-2.0." in written["description"]
    assert (folder / "LICENSE").read_bytes() == templates.APACHE.read_bytes()


def test_a_model_card_may_list_several_sources_and_licences(model, tmp_path):
    folder, written = weights(model, tmp_path, "---\nlicense: [mit, apache-2.0]\nbase_model:\n- some/model\n- other/model\n---\n")
    assert written["licenses"] == [{"name": "other"}] and metadata.faults(folder) == []
    assert "Source: some/model, other/model. Licence: mit, apache-2.0." in written["description"]


def test_weights_with_a_licence_kaggle_does_not_list_name_it(model, tmp_path):
    folder, written = weights(model, tmp_path, origin=templates.Origin("MIT", "my own training"))
    assert written["licenses"] == [{"name": "other"}] and "Licence: MIT." in written["description"]
    assert metadata.faults(folder) == [] and not (folder / "LICENSE").exists()


def test_weights_of_unknown_origin_are_not_for_upload(model, tmp_path):
    folder, _ = weights(model, tmp_path)
    found = metadata.faults(folder)
    assert len(found) == 2 and "licence unknown" in found[0] and "source not stated" in found[1]


def test_a_licence_beside_the_weights_goes_in(model, tmp_path):
    with_licence = shutil.copytree(model, tmp_path / "with")
    (with_licence / "LICENSE").write_text("as the authors wrote it")
    folder, _ = weights(with_licence, tmp_path, origin=templates.Origin("apache-2.0", "some/model"))
    assert (folder / "model/LICENSE").read_text() == "as the authors wrote it" and not (folder / "LICENSE").exists()
