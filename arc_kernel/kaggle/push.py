"""Bundles and notebook go to Kaggle: datasets created or versioned, awaited until ready, then the kernel pushed.

What was uploaded is remembered by its sha256 in the cache folder, so that nothing unchanged is uploaded again. Knows
folders and their metadata; `client` talks to Kaggle, `metadata` says what is wrong with a folder.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import bundle
from ..errors import ArcKernelError
from ..files import cache_folder, parse_json, read_json, replacing
from . import client, metadata

READY_WITHIN = 1800.0  # seconds Kaggle is given to unpack a dataset
ASK_EVERY = 10.0  # seconds between two questions
STATUS = "json(status,current_version_number)"  # of `kaggle datasets status --format`, from kaggle 2.2 on


@dataclass(frozen=True)
class State:
    """A dataset on Kaggle: its current `version`, and its `status` in Kaggle's words (`ready`, `failed`, ...)."""

    version: int
    status: str


def push(datasets: Sequence[Path], kernel: Path | None = None, *, message: str = "", dry_run: bool = False,
         timeout: float = READY_WITHIN, poll: float = ASK_EVERY, say: Callable[[str], None] = print, again: bool = False) -> list[str]:
    """Upload what has changed of the dataset folders, wait until Kaggle has unpacked it, push the kernel folder.

    Returns the ids that were uploaded. `timeout` and `poll` are seconds per dataset; `dry_run` only says the commands; `again` uploads
    and pushes also what was uploaded before, should it have been changed or lost on Kaggle.
    Raises ArcKernelError for a fault of a folder (before anything is uploaded), a missing client and every refusal of
    Kaggle.
    """
    folders = [Path(folder).resolve() for folder in (*datasets, *([kernel] if kernel else []))]
    for folder in folders:
        metadata.check(folder)
    refs = [_metadata(folder)["id"] for folder in folders[:len(datasets)]]
    if kernel:
        sources = {"/".join(source.split("/")[:2]) for source in _metadata(folders[-1])["dataset_sources"]}
        if missing := sorted(set(refs) - sources):
            raise ArcKernelError(f"{folders[-1] / metadata.KERNEL}: {missing[0]} is not among its dataset_sources: "
                                 "build all with one --username")
    if dry_run:
        _dry_run(folders, len(datasets), message, say, again)
        return []
    client.check_installed()
    for key in (*refs, *([f"kernel {_metadata(folders[-1])['id']}"] if kernel else [])) if again else ():
        _remember(key, None)
    for ref, folder in zip(refs, folders):
        if not _known(ref, _digest(folder)):
            bundle.verify(bundle.Bundle("", folder, read_json(folder / bundle.MANIFEST)))
    uploaded = [ref for ref, folder in zip(refs, folders) if _upload(ref, folder, message, say)]
    for ref in refs:
        _await(ref, timeout, poll, say)
    if kernel:
        uploaded += _push_kernel(folders[-1], folders[:-1], say)
        for line in watch(_metadata(folders[-1])["id"]):
            say(line)
    return uploaded


def watch(ref: str) -> list[str]:
    """How to follow the run of the kernel `ref` (`<user>/<slug>`) from a terminal, a line each."""
    return [f"how it goes:     {client.command('kernels', 'status', ref)}",
            f"what it prints:  {client.command('kernels', 'logs', ref, '--follow')}",
            f"what it leaves:  {client.command('kernels', 'output', ref, '-p', 'runs/kaggle')}",
            f"quota left:      {client.command('quota')}"]


def _upload(ref: str, folder: Path, message: str, say: Callable[[str], None]) -> bool:
    """Create the dataset or a new version of it; False where Kaggle has this very content."""
    there, digest = _state(ref), _digest(folder)
    if there and _known(ref, digest):
        say(f"{ref}: unchanged since its last upload")
        return False
    arguments = _upload_command(folder, bool(there), message)
    say(f"{ref}: {client.command(*arguments)}")
    client.do(*arguments, success="is being created", say=say)
    _remember(ref, {"sha256": digest, "replaces": there.version if there else 0})
    return True


def _await(ref: str, timeout: float, poll: float, say: Callable[[str], None]) -> None:
    """Wait until the uploaded version is Kaggle's current one and ready."""
    start, replaces = time.monotonic(), _remembered().get(ref, {}).get("replaces", 0)
    while True:
        state, waited = _state(ref), time.monotonic() - start
        if state and state.status in ("failed", "deleted"):
            _remember(ref, None)
            raise ArcKernelError(f"{ref}: Kaggle could not take the upload ({state.status}): look at its page and push again")
        if state and state.status == "ready" and state.version > replaces:
            say(f"{ref}: version {state.version} ready ({waited:.0f} s)")
            return
        known = f"version {state.version} {state.status}" if state else "not listed yet"
        if waited + poll > timeout:
            raise ArcKernelError(f"{ref}: not ready after {waited:.0f} s ({known}): push again later, nothing is uploaded twice")
        say(f"{ref}: {known}, {waited:.0f} of {timeout:.0f} s")
        time.sleep(poll)


def _push_kernel(folder: Path, datasets: Sequence[Path], say: Callable[[str], None]) -> list[str]:
    """Push the kernel, unless it and its datasets are as at its last push; [its id] if pushed."""
    ref, digest = _metadata(folder)["id"], _kernel_digest(folder, datasets)
    if _known(f"kernel {ref}", digest):
        say(f"{ref}: unchanged since its last push")
        return []
    arguments = ("kernels", "push", "-p", str(folder))
    say(f"{ref}: {client.command(*arguments)}")
    client.do(*arguments, success="successfully pushed", say=say)
    _remember(f"kernel {ref}", {"sha256": digest})
    return [ref]


def _dry_run(folders: Sequence[Path], datasets: int, message: str, say: Callable[[str], None], again: bool) -> None:
    for folder in folders[:datasets]:
        ref = _metadata(folder)["id"]
        say(client.command("datasets", "status", ref, "--format", STATUS))
        if not again and _known(ref, _digest(folder)):
            say(f"  if it is there: nothing, {ref} is unchanged since its last upload")
        else:
            say(f"  if it is there: {client.command(*_upload_command(folder, True, message))}")
        say(f"  if it is not:   {client.command(*_upload_command(folder, False, message))}")
        say(f"  until ready:    {client.command('datasets', 'status', ref, '--format', STATUS)}")
    for folder in folders[datasets:]:
        ref = _metadata(folder)["id"]
        same = not again and _known(f"kernel {ref}", _kernel_digest(folder, folders[:datasets]))
        say(f"{ref}: unchanged since its last push" if same else client.command("kernels", "push", "-p", str(folder)))


def _upload_command(folder: Path, there: bool, message: str) -> tuple[str, ...]:
    """The client's arguments to upload a bundle; without --dir-mode it leaves folders out."""
    if there:
        note = message or f"arc-kernel bundle {_digest(folder)[:12]}"
        return ("datasets", "version", "-p", str(folder), "--dir-mode", "zip", "-m", note)
    return ("datasets", "create", "-p", str(folder), "--dir-mode", "zip")


def _state(ref: str) -> State | None:
    """The dataset on Kaggle, or None where this user can see none of this id."""
    printed = client.ask("datasets", "status", ref, "--format", STATUS)
    if printed is None:
        return None
    try:
        answer = parse_json(printed.splitlines()[-1])
        return State(int(answer["current_version_number"] or 0), answer["status"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise ArcKernelError(f"{ref}: the client's answer is no status ({printed[:100]!r}): pip install 'kaggle>=2.2.5'") from None


def _metadata(folder: Path) -> dict:
    path = folder / metadata.KERNEL
    return read_json(path if path.is_file() else folder / metadata.DATASET)


def _digest(folder: Path) -> str:
    """The sha256 of a bundle: of its manifest, which holds that of every file, and its metadata."""
    return hashlib.sha256((folder / bundle.MANIFEST).read_bytes() + (folder / metadata.DATASET).read_bytes()).hexdigest()


def _kernel_digest(folder: Path, datasets: Sequence[Path]) -> str:
    files = [folder / metadata.KERNEL, folder / _metadata(folder)["code_file"]]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files) + "".join(map(_digest, datasets)).encode()).hexdigest()


def _memory() -> Path:
    return cache_folder() / "kaggle-pushed.json"


def _remembered() -> dict:
    try:
        memory = read_json(_memory())
    except (OSError, ValueError):
        memory = {}
    return {k: v for k, v in memory.items() if isinstance(v, dict)} if isinstance(memory, dict) else {}


def _known(key: str, digest: str) -> bool:
    """Whether the last upload under `key` had this content."""
    return _remembered().get(key, {}).get("sha256") == digest


def _remember(key: str, value: dict | None) -> None:
    """Write what was uploaded under `key`; None forgets it."""
    memory = {k: v for k, v in (_remembered() | {key: value}).items() if v is not None}
    with replacing(_memory()) as file:
        json.dump(memory, file, indent=1, sort_keys=True)
