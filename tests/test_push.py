"""Pushing with Kaggle's real client, as installed, against a stand-in for Kaggle on the loopback.

    python -m pytest tests/test_push.py
"""

import base64
import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import re
import sys
import zipfile
from pathlib import Path

import pytest

from arc_kernel.errors import ArcKernelError
from arc_kernel.kaggle import datasets, client, metadata, profiles, push

pytest.importorskip("cryptography", reason="the stand-in's certificate needs it")
from kaggle_standin import Standin  # noqa: E402

HOME = Path(__file__).resolve().parent.parent
KEY = "5ca1ab1e" * 4  # a fake one, as long as a real one
REF, KERNEL = "someone/arc-kernel-code", "someone/arc-kernel-submission"
PROFILE = dataclasses.replace(profiles.load("kaggle-t4"), docker_image="example/python@sha256:" + "0" * 64)
DATASETS, KERNELS = "datasets.DatasetApiService", "kernels.KernelsApiService"
no_client = pytest.mark.skipif(importlib.util.find_spec("kaggle") is None, reason="Kaggle's client is not installed")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user with nothing of the real one's, and a fake key in the environment only."""
    for name in [name for name in os.environ if name.startswith("KAGGLE_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    (tmp_path / "tmp").mkdir()
    values = {"HOME": tmp_path, "TMPDIR": tmp_path / "tmp", "ARC_KERNEL_CACHE": tmp_path / "cache", "KAGGLE_USERNAME": "someone",
              "KAGGLE_KEY": KEY, "XDG_CONFIG_HOME": tmp_path / "config", "VERBOSE": "true"}  # a verbose client would print the key
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    return tmp_path


@pytest.fixture
def code(home):
    return datasets.build_code(home / "bundles", "someone", lambda line: None)


@pytest.fixture
def kernel(home):
    return metadata.write_kernel(home / "kernel", HOME / "notebooks/submission.ipynb", PROFILE, "someone", [REF])


@pytest.fixture
def said(home):
    """All that was said; at the end no trace of the key is in it, nor in any file."""
    lines = []
    yield lines
    secrets = [KEY, base64.b64encode(f"someone:{KEY}".encode()).decode()]
    written = [f.read_bytes() for f in home.rglob("*") if f.is_file()]
    assert written and not any(secret in text for secret in secrets for text in lines)
    assert not any(secret.encode() in data for secret in secrets for data in written)


@pytest.fixture
def kaggle(home, monkeypatch):
    with Standin(home) as standin:
        for name, value in standin.environment.items():
            monkeypatch.setenv(name, value)
        yield standin
    assert standin.hosts <= {"api.kaggle.com"}


def refused(said, *arguments, **options) -> str:
    with pytest.raises(ArcKernelError) as caught:
        push.push(*arguments, poll=0.0, say=said.append, **options)
    said.append(str(caught.value))
    assert "\n" not in said[-1] and said[-1].count(": ") >= 2
    return said[-1]


def uploaded(standin) -> dict[str, str]:
    """The sha256 of each file as Kaggle would mount it: a folder arrives as a zip of its contents."""
    files = {}
    for name, data in standin.blobs.items():
        if name.endswith(".zip"):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                files |= {f"{name.removesuffix('.zip')}/{inner}": archive.read(inner) for inner in archive.namelist()}
        else:
            files[name] = data
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


@no_client
def test_success_and_nothing_twice(kaggle, code, kernel, said):
    assert push.push([code], kernel, poll=0.0, say=said.append) == [REF, KERNEL]
    manifest = json.loads((code / "manifest.json").read_text())
    assert {name: file["sha256"] for name, file in manifest["files"].items()} | {
        "manifest.json": hashlib.sha256((code / "manifest.json").read_bytes()).hexdigest()} == uploaded(kaggle)
    created, saved = kaggle.called("CreateDataset")[0], kaggle.called("SaveKernel")[0]
    assert (created["slug"], created["licenseName"], created["isPrivate"]) == ("arc-kernel-code", "other", True)
    assert (saved["slug"], saved["machineShape"], saved["enableInternet"]) == (KERNEL, "NvidiaTeslaT4", False)
    assert (saved["datasetDataSources"], saved["competitionDataSources"]) == ([REF], [PROFILE.competition])
    assert [cell["source"] for cell in json.loads(saved["text"])["cells"]] == [
        "".join(cell["source"]) for cell in json.loads((HOME / "notebooks/submission.ipynb").read_text())["cells"]]
    assert any(f"kaggle kernels status {KERNEL}" in line for line in said)
    assert kaggle.users == {"Basic " + base64.b64encode(f"someone:{KEY}".encode()).decode()}  # the client did use the key
    kaggle.blobs.clear()
    assert push.push([code], kernel, poll=0.0, say=said.append) == []
    assert not kaggle.blobs and len(kaggle.called("SaveKernel")) == 1 and f"{REF}: unchanged since its last upload" in said
    assert push.push([code], kernel, poll=0.0, say=said.append, again=True) == [REF, KERNEL] and len(kaggle.called("SaveKernel")) == 2


@no_client
def test_slow_processing_of_a_new_version_is_awaited(kaggle, code, said):
    kaggle.datasets[REF], kaggle.slow = 6, 2  # there already, from another machine
    assert push.push([code], message="a 'new' start", poll=0.0, say=said.append) == [REF]
    assert not kaggle.called("CreateDataset") and kaggle.called("CreateDatasetVersion")[0]["body"]["versionNotes"] == "a 'new' start"
    assert len([line for line in said if line.startswith(f"{REF}: version 7 blobs_received, ")]) == 2
    assert said[-1].startswith(f"{REF}: version 7 ready")


@no_client
def test_never_ready_is_a_timeout_and_no_second_upload(kaggle, code, said):
    kaggle.slow = 99
    assert re.search(r"not ready after \d+ s \(version 1 blobs_received\): push again later", refused(said, [code], timeout=0.0))
    kaggle.pending.clear()
    assert push.push([code], poll=0.0, say=said.append) == []
    assert len(kaggle.called("CreateDataset")) == 1 and said[-1].startswith(f"{REF}: version 1 ready")


@no_client
def test_an_old_version_is_not_taken_for_the_new_one(kaggle, code, said):
    kaggle.datasets[REF] = 6
    kaggle.answers[f"{DATASETS}/CreateDatasetVersion"] = (200, {"status": "ok", "url": "x", "error": ""})  # and the version stays 6
    assert re.search(r"not ready after \d+ s \(version 6 ready\)", refused(said, [code], timeout=0.0))


@no_client
def test_failed_processing_is_named_and_to_be_uploaded_again(kaggle, code, said):
    kaggle.outcome = "FAILED"
    assert "could not take the upload (failed)" in refused(said, [code])
    push.push([code], dry_run=True, say=said.append)
    assert f"  if it is there: kaggle datasets version -p {code} " in "\n".join(said)


@no_client
@pytest.mark.parametrize("answer, words", [
    ((200, {"status": "error", "error": 'The requested title "arc-kernel code" is already in use by a dataset. '
                                        'Please choose another title.'}), "the name is taken"),
    ((200, {"status": "error", "error": 'Slug can only contain alphanumeric or "-" characters'}), "Kaggle does not take the id"),
    ((429, {"code": 429, "message": "Too many requests"}), "too many requests")])
def test_refusal_of_a_dataset(kaggle, code, kernel, said, answer, words):
    kaggle.answers[f"{DATASETS}/CreateDataset"] = answer
    message = refused(said, [code], kernel)
    assert message.startswith(f"kaggle datasets create -p {code} --dir-mode zip: {words} (") and not kaggle.called("SaveKernel")


@no_client
@pytest.mark.parametrize("answer, words", [
    ((200, {"error": "Maximum batch GPU session count of 2 reached."}), "the accelerator quota is used up (Maximum batch GPU"),
    ((429, {"code": 429, "message": "Too many requests"}), "too many requests ("),
    ((200, {"versionNumber": 1, "error": "", "invalidDatasetSources": [REF]}), "pushed without all of its inputs (not valid"),
    ((500, {"code": 500, "message": "Internal error"}), "Kaggle refused (")])
def test_refusal_of_a_kernel(kaggle, kernel, said, answer, words):
    kaggle.answers[f"{KERNELS}/SaveKernel"] = answer
    assert refused(said, [], kernel).startswith(f"kaggle kernels push -p {kernel}: {words}")
    push.push([], kernel, dry_run=True, say=said.append)
    assert said[-1] == f"kaggle kernels push -p {kernel}"  # a refused push is not remembered as done


@no_client
@pytest.mark.parametrize("kind", ["key", "token"])
def test_expired_credentials_are_named(kaggle, code, said, monkeypatch, kind):
    unauthenticated = (401, {"code": 401, "message": "Unauthenticated"})
    if kind == "token":
        monkeypatch.setenv("KAGGLE_API_TOKEN", KEY)
        kaggle.answers["security.OAuthService/IntrospectToken"] = unauthenticated
    kaggle.answers[f"{DATASETS}/GetDatasetStatus"] = unauthenticated
    assert "Kaggle does not take the credentials" in refused(said, [code]) and "make a new API token" in said[-1]
    assert not kaggle.blobs


@no_client
def test_a_kaggle_out_of_reach_is_named(kaggle, code, said, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(client, "QUICK", 0.05)  # seconds, in which no client even starts
        assert "Kaggle cannot be reached (no answer within 0.05 s)" in refused(said, [code])
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    assert "Kaggle cannot be reached (" in refused(said, [code])


def test_dry_run_says_the_commands_and_does_nothing(kaggle, code, kernel, said):
    before = sorted(f for f in code.parents[1].rglob("*"))
    assert push.push([code], kernel, dry_run=True, message="why", say=said.append) == []
    text = "\n".join(said)
    assert f"kaggle datasets create -p {code} --dir-mode zip\n" in text
    assert f"kaggle datasets version -p {code} --dir-mode zip -m why\n" in text
    assert f"kaggle kernels push -p {kernel}" in text
    assert not kaggle.requests and sorted(f for f in code.parents[1].rglob("*")) == before


def test_faults_stop_before_anything_is_uploaded(kaggle, code, kernel, said):
    (code / "kaggle.json").write_text("{}")
    assert "kaggle.json" in refused(said, [code], kernel)
    (code / "kaggle.json").unlink()
    other = metadata.write_kernel(kernel, HOME / "notebooks/submission.ipynb", PROFILE, "someone", ["someone/another-dataset"])
    assert f"{REF} is not among its dataset_sources" in refused(said, [code], other)
    assert not kaggle.requests


@no_client
def test_changed_bytes_are_not_uploaded(kaggle, code, said):
    file = code / "arc_kernel/views.py"
    file.write_bytes(file.read_bytes().replace(b"a", b"b", 1))
    assert "views.py has changed bytes" in refused(said, [code]) and not kaggle.blobs


def test_a_missing_client_is_named(kaggle, code, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaggle", None)
    assert "Kaggle's client is not installed: pip install" in refused(said, [code])
    assert not kaggle.requests


def test_digests_tell_all_that_is_uploaded(code, kernel):
    seen = []
    digests = lambda: seen.append((push._digest(code), push._kernel_digest(kernel, [code])))
    digests()
    written = json.loads((code / "dataset-metadata.json").read_text())
    (code / "dataset-metadata.json").write_text(json.dumps(written | {"subtitle": "Another subtitle, long enough"}))
    digests()
    assert seen[0][0] != seen[1][0] and seen[0][1] != seen[1][1]  # a kernel is pushed again to see its datasets' new versions
    with open(kernel / "submission.ipynb", "a", encoding="utf-8") as file:
        file.write("\n")
    digests()
    assert seen[1][0] == seen[2][0] and seen[1][1] != seen[2][1]


def test_dataset_that_is_gone_from_kaggle_is_made_again(code, monkeypatch):
    states, did = iter([None, push.State(1, "ready")]), []
    push._remember(REF, {"sha256": push._digest(code), "replaces": 0})
    monkeypatch.setattr(push, "_state", lambda ref: next(states))
    monkeypatch.setattr(client, "check_installed", lambda: None)
    monkeypatch.setattr(client, "do", lambda *arguments, **_: did.append(arguments[:2]))
    assert push.push([code], poll=0.0, say=lambda line: None) == [REF] and did == [("datasets", "create")]


@pytest.mark.parametrize("again, unchanged", [(False, 2), (True, 0)])
def test_dry_run_of_pushing_again_says_what_would_be_pushed(code, home, again, unchanged):
    kernel = metadata.write_kernel(home / "kernel", HOME / "notebooks/submission.ipynb", PROFILE, "someone", [f"{REF}/3"])
    push._remember(REF, {"sha256": push._digest(code), "replaces": 0})
    push._remember(f"kernel {KERNEL}", {"sha256": push._kernel_digest(kernel, [code])})
    said = []
    push.push([code], kernel, dry_run=True, again=again, say=said.append)
    assert sum("unchanged" in line for line in said) == unchanged


def test_status_is_the_clients_last_line_and_a_damaged_memory_is_none(home, monkeypatch):
    monkeypatch.setattr(client, "ask", lambda *_: 'Warning: a newer client\n{"current_version_number": null, "status": "ready"}')
    assert push._state(REF) == push.State(0, "ready")
    push._remember(REF, {"sha256": "x"})
    push._memory().write_text("{")
    assert push._remembered() == {}
