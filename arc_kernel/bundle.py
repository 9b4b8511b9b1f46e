"""Kaggle datasets found again: bundles of `kaggle/datasets`, each with a manifest of every byte, wherever Kaggle mounts them.

For the notebook, on read-only mounts whose layout differs from run to run. Knows nothing of tasks, prompts or runs, and
imports only the standard library, which a bare Kaggle image has.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import ArcKernelError
from .files import parse_json, read_json

MANIFEST, METADATA, KIND = "manifest.json", "dataset-metadata.json", "arc_kernel_bundle"
KINDS = ("code", "weights", "adapter", "wheels")
DATASETS = {"code": "arc-kernel-code", "weights": "arc-kernel-<model>"}
DEPTH = 8  # folders below the input root that are looked into; Kaggle mounts a dataset 1 to 3 below it, a model 6
AGAIN = "build the bundle again (python build_kernel.py) and upload it"


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk: `kind` is `code`, `weights`, `adapter` or `wheels`, `manifest` the parsed manifest.json in `folder`."""

    kind: str
    folder: Path
    manifest: dict


@dataclass(frozen=True)
class Inputs:
    """What a run reads: `code` goes onto sys.path, `model` is a model folder, `adapter` a trained LoRA's, `wheels` a bundle's.

    None is what is not attached.
    """

    code: Path
    model: Path | None
    adapter: Path | None
    wheels: Path | None


def find_bundles(root: Path) -> dict[str, Bundle]:
    """The bundles below `root` by kind, wherever Kaggle mounted them; other manifest.json files are passed over.

    Raises ArcKernelError when `root` is no folder, when a bundle's manifest is incomplete, or when two different bundles
    of one kind are there (copies of the same bundle are fine).
    """
    found: dict[str, Bundle] = {}
    for folder, manifest in _manifests(root):
        if not isinstance(manifest, dict) or KIND not in manifest:
            continue
        if not isinstance(kind := manifest[KIND], str) or not complete(manifest.get("files")):
            raise ArcKernelError(f"{folder / MANIFEST}: damaged: {AGAIN}")
        first = found.setdefault(kind, Bundle(kind, folder, manifest))
        if first.manifest != manifest:
            raise ArcKernelError(f"{first.folder} and {folder}: two different {kind} bundles: detach one of the datasets")
    return found


def verify(bundle: Bundle) -> None:
    """Read every file of the manifest; raises ArcKernelError naming the bundle and the first file that is not as built."""
    files = sorted(bundle.manifest["files"].items())
    for name, expected in files:  # sizes first: a missing file is told without hashing gigabytes
        path = bundle.folder / name
        if not os.path.isfile(path):
            raise ArcKernelError(f"{bundle.folder}: {name} is missing: {AGAIN}")
        if path.stat().st_size != expected["bytes"]:
            raise ArcKernelError(f"{bundle.folder}: {name} has {path.stat().st_size} bytes, expected {expected['bytes']}: {AGAIN}")
    for name, expected in files:
        try:
            found = sha256(bundle.folder / name)
        except OSError as error:
            raise ArcKernelError(f"{bundle.folder}: {name} cannot be read ({error.strerror}): {AGAIN}") from None
        if found != expected["sha256"]:
            raise ArcKernelError(f"{bundle.folder}: {name} has changed bytes: {AGAIN}")


def find_inputs(root: Path, weights: bool = True) -> Inputs:
    """The verified bundles below `root`, to which nothing is written.

    Raises ArcKernelError as `find_bundles` and `verify` do, and when the code or (where `weights` are wanted) the weights
    are missing: what to attach.
    """
    bundles = find_bundles(root)
    for kind, dataset in list(DATASETS.items())[: 1 + weights]:
        if kind not in bundles:
            hint = next((f" ({folder / MANIFEST} is not JSON)" for folder, manifest in _manifests(root) if manifest is None), "")
            raise ArcKernelError(f"{root}: no {kind} bundle{hint}: attach the dataset {dataset} (made by python build_kernel.py)")
    for found in bundles.values():
        verify(found)
    folder = lambda kind, below: bundles[kind].folder / below if kind in bundles else None
    return Inputs(bundles["code"].folder, folder("weights", "model"), folder("adapter", "adapter"), folder("wheels", ""))


def find_challenges(root: Path, name: str, competition: str = "") -> Path:
    """The challenges file called `name` below `root`, the shallowest one; copies of the same content are fine.

    One of the `competition` (a slug), or in Kaggle's folder of competitions at the top of `root`, goes before others: a copy in a
    dataset is that of the placeholder, which in a scoring run is another file. Raises ArcKernelError where there is none that holds
    ARC tasks (what was found, and where), or two that differ.
    """
    named = [folder / name for folder, files in _walk(root) if name in files]
    found = {path: content for path in named if (content := _tasks_in(path)) is not None}
    if not found:
        others = [str(folder / f) for folder, files in _walk(root) for f in files if f.endswith("challenges.json")]
        seen = f"{named[0]} holds no ARC tasks" if named else f"no {name} in it" + (f", but {', '.join(others[:3])}" if others else "")
        raise ArcKernelError(f"{root}: {seen}: attach the competition, or set tasks to the file")
    standing = {path: _standing(path.relative_to(root).parts[:-1], competition) for path in found}
    first, *rest = [path for path in found if standing[path] == min(standing.values())]
    if other := next((path for path in rest if found[path] != found[first]), None):
        raise ArcKernelError(f"{first} and {other}: two different challenges files: detach one, or set tasks to the file")
    return first


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _standing(folders: tuple[str, ...], competition: str) -> int:
    """How far a file in `folders` below the root is from being the competition's own, 0: surely its own."""
    at_the_top = ("competitions", competition), ("competitions",), (competition,)  # the last as older sessions mount it
    signs = [*(folders[: len(top)] == top for top in at_the_top), competition in folders, True]
    return signs.index(True)


def _tasks_in(path: Path) -> bytes | None:
    """A file's bytes where it looks like ARC tasks by id, some of which may be broken, else None."""
    try:
        content = path.read_bytes()
        tasks = parse_json(content)
        return content if any(isinstance(task, dict) and {"train", "test"} <= set(task) for task in tasks.values()) else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders from `root` down, shallowest then alphabetical, with their file names; no hidden folder, none twice."""
    if not Path(root).is_dir():
        raise ArcKernelError(f"{root}: no such input folder: give the folder the datasets are mounted in")
    level, seen = [Path(root)], set()
    for _ in range(DEPTH + 1):
        below = []
        for folder in level:
            real = os.path.realpath(folder)  # links are followed: a loop must end
            if real in seen:
                continue
            seen.add(real)
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError:  # an unreadable folder of somebody else's dataset
                continue
            files = [entry.name for entry in entries if os.path.isfile(entry)]  # entry.is_file() raises for a link to itself
            below += [folder / entry.name for entry in entries if os.path.isdir(entry) and not entry.name.startswith(".")]
            yield folder, files
        level = below


def _manifests(root: Path) -> Iterator[tuple[Path, object]]:
    """Each folder below `root` with a manifest.json and what that holds; None where it is no JSON."""
    for folder, files in _walk(root):
        if MANIFEST in files:
            try:
                yield folder, read_json(folder / MANIFEST)
            except (OSError, ValueError):
                yield folder, None


def complete(files) -> bool:
    """Whether `files` is what a manifest lists: relative paths inside the bundle, each with its sha256 and bytes."""
    return isinstance(files, dict) and bool(files) and all(
        not os.path.isabs(name) and ".." not in name.split("/") and isinstance(f, dict)
        and isinstance(f.get("sha256"), str) and isinstance(f.get("bytes"), int) for name, f in files.items())
