"""Kaggle datasets: the package and the weights become folders with a manifest of every byte, and are found again on Kaggle.

Building is for a clone; finding and verifying for the notebook, on read-only mounts whose layout differs from run to run.
Knows nothing of tasks, prompts or runs, and imports only the standard library, which a bare Kaggle image has.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import __version__
from .errors import ArcKernelError
from .kaggle import templates

MANIFEST, METADATA, KIND = "manifest.json", "dataset-metadata.json", "arc_kernel_bundle"
PACKAGE = Path(__file__).resolve().parent
USERNAME = templates.USERNAME
DATASETS = {"code": "arc-kernel-code", "weights": "arc-kernel-<model>"}
PARTS = (".py", ".toml", ".txt")  # what the package is made of: modules, profiles, lists of packages
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


def build_code(out: Path, username: str = USERNAME, say: Callable[[str], None] = print) -> Path:
    """Write the package, its requirements and the notebook's source as `out`/arc-kernel-code; returns that folder.

    `say` gets one line on what was done. Raises ArcKernelError for a bad user name, a broken metadata template, a folder
    in the way that is no bundle, or an `out` that cannot be written.
    """
    sources = {f"{PACKAGE.name}/{f.relative_to(PACKAGE).as_posix()}": f for f in PACKAGE.rglob("*")
               if f.suffix in PARTS and not f.parent.name.startswith(".")}  # Jupyter's checkpoints
    beside = {name: PACKAGE.parent / name for name in ("requirements.txt", "requirements-cpu.txt", "notebooks/submission.py")}
    sources |= {name: file for name, file in beside.items() if file.is_file()}
    return build(Path(out) / DATASETS["code"], "code", {}, sources, username, say)


def build_weights(out: Path, model: str, username: str = USERNAME, say: Callable[[str], None] = print,
                  origin: templates.Origin = templates.Origin()) -> Path:
    """Write the config, tokenizer, safetensors and licence of `model` as `out`/arc-kernel-<model name>; returns that folder.

    What `origin` leaves open is taken from the model folder's README.md; the embedded model's is known. Raises ArcKernelError
    as `checkpoint.open_model` and `build_code` do, and for a name Kaggle would not take.
    """
    from . import checkpoint

    folder = checkpoint.open_model(model)
    known = templates.SMOLLM2 if model == checkpoint.EMBEDDED else templates.model_card(folder)
    return _build_trained(out, "weights", "model", folder, (*checkpoint.TEXTS, checkpoint.WEIGHTS), username, say, origin, known)


def build_adapter(out: Path, folder: Path, username: str = USERNAME, say: Callable[[str], None] = print,
                  origin: templates.Origin = templates.Origin()) -> Path:
    """Write the config, safetensors and licence of a trained peft LoRA as `out`/arc-kernel-adapter-<name>; returns that folder.

    What `origin` leaves open is taken from the adapter's README.md. Raises ArcKernelError as `checkpoint.check_adapter` and
    `build_code` do, and for a name Kaggle would not take.
    """
    from . import checkpoint

    folder = Path(folder)
    checkpoint.check_adapter(folder)
    return _build_trained(out, "adapter", "adapter", folder, checkpoint.ADAPTER, username, say, origin, templates.model_card(folder))


def trained_name(kind: str, folder: str | Path) -> str:
    """The dataset name of a `weights` or `adapter` bundle, after its `folder`; ArcKernelError for one Kaggle would not take."""
    label = os.path.basename(os.path.abspath(folder))
    before = "arc-kernel-" if kind == "weights" else f"arc-kernel-{kind}-"
    name = before + re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
    taken = kind == "weights" and re.match(r"arc-kernel-(?:(?:code|notebook)$|adapter-|wheels-)", name)
    if taken or not len(before) < len(name) <= 50:
        most = 50 - len(before)
        raise ArcKernelError(f"{folder}: its name makes no Kaggle dataset id ({name}): rename the folder, at most {most} letters")
    return name


def find_bundles(root: Path) -> dict[str, Bundle]:
    """The bundles below `root` by kind, wherever Kaggle mounted them; other manifest.json files are passed over.

    Raises ArcKernelError when `root` is no folder, when a bundle's manifest is incomplete, or when two different bundles
    of one kind are there (copies of the same bundle are fine).
    """
    found: dict[str, Bundle] = {}
    for folder, manifest in _manifests(root):
        if not isinstance(manifest, dict) or KIND not in manifest:
            continue
        if not isinstance(kind := manifest[KIND], str) or not _complete(manifest.get("files")):
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
        if not path.is_file():
            raise ArcKernelError(f"{bundle.folder}: {name} is missing: {AGAIN}")
        if path.stat().st_size != expected["bytes"]:
            raise ArcKernelError(f"{bundle.folder}: {name} has {path.stat().st_size} bytes, expected {expected['bytes']}: {AGAIN}")
    for name, expected in files:
        try:
            sha256 = _sha256(bundle.folder / name)
        except OSError as error:
            raise ArcKernelError(f"{bundle.folder}: {name} cannot be read ({error.strerror}): {AGAIN}") from None
        if sha256 != expected["sha256"]:
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


def find_challenges(root: Path, name: str) -> Path:
    """The challenges file called `name` below `root`, the shallowest one; copies of the same content are fine.

    Raises ArcKernelError where there is none that holds ARC tasks (what was found, and where), or two that differ.
    """
    named = [folder / name for folder, files in _walk(root) if name in files]
    found = {path: content for path in named if (content := _tasks_in(path)) is not None}
    if not found:
        others = [str(folder / f) for folder, files in _walk(root) for f in files if f.endswith("challenges.json")]
        seen = f"{named[0]} holds no ARC tasks" if named else f"no {name} in it" + (f", but {', '.join(others[:3])}" if others else "")
        raise ArcKernelError(f"{root}: {seen}: attach the competition, or set tasks to the file")
    first, *rest = found
    if other := next((path for path in rest if found[path] != found[first]), None):
        raise ArcKernelError(f"{first} and {other}: two different challenges files: detach one, or set tasks to the file")
    return first


def _tasks_in(path: Path) -> bytes | None:
    """A file's bytes where it looks like ARC tasks by id, else None."""
    try:
        content = path.read_bytes()
        tasks = json.loads(content)
        return content if tasks and all({"train", "test"} <= set(task) for task in tasks.values()) else None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
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
                files = [entry.name for entry in entries if entry.is_file()]
                below += [folder / entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
            except OSError:  # an unreadable folder of somebody else's dataset
                continue
            yield folder, files
        level = below


def _manifests(root: Path) -> Iterator[tuple[Path, object]]:
    """Each folder below `root` with a manifest.json and what that holds; None where it is no JSON."""
    for folder, files in _walk(root):
        if MANIFEST in files:
            try:
                yield folder, json.loads((folder / MANIFEST).read_bytes())
            except (OSError, ValueError, RecursionError):
                yield folder, None


def _complete(files) -> bool:
    """Whether `files` is what a manifest lists: relative paths inside the bundle, each with its sha256 and bytes."""
    return isinstance(files, dict) and bool(files) and all(
        not os.path.isabs(name) and ".." not in name.split("/") and isinstance(f, dict)
        and isinstance(f.get("sha256"), str) and isinstance(f.get("bytes"), int) for name, f in files.items())


def _build_trained(out: Path, kind: str, inside: str, folder: Path, patterns: tuple[str, ...], username: str,
                   say: Callable[[str], None], origin: templates.Origin, known: templates.Origin) -> Path:
    """The bundle of what matches `patterns` in `folder`, put into the folder `inside` of it."""
    origin = templates.Origin(origin.licence or known.licence, origin.source or known.source)
    sources = {f"{inside}/{f.name}": f for pattern in patterns for f in folder.glob(pattern) if f.is_file()}
    if origin.licence.lower() == "apache-2.0" and not list(folder.glob("LICENSE*")):
        sources["LICENSE"] = templates.APACHE
    label = os.path.basename(os.path.abspath(folder))
    return build(Path(out) / trained_name(kind, folder), kind, {inside: label}, sources, username, say, origin)


def build(folder: Path, kind: str, extra: dict, sources: dict[str, Path], username: str, say: Callable[[str], None],
          origin: templates.Origin = templates.Origin(), copy: Callable[[Path, Path], object] = shutil.copyfile) -> Path:
    """Put `sources` (path in the bundle -> file) into `folder` with manifest and metadata, unless it is there already.

    `extra` goes into the manifest, `origin` into the metadata, `copy` takes source and destination. Raises ArcKernelError
    as `build_code` does.
    """
    start = time.perf_counter()
    metadata = templates.fill(kind, folder.name, username, origin)
    files = {path: {"sha256": _sha256(source), "bytes": source.stat().st_size} for path, source in sources.items()}
    manifest = {KIND: kind, "name": folder.name, "version": __version__, **extra, "files": files}
    texts = {METADATA: _dump(metadata), MANIFEST: _dump(manifest)}  # the manifest last: without it a folder is no bundle
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise ArcKernelError(f"{folder}: in the way and no bundle: move it, or give another --out")
    unchanged = _is_built(Bundle(kind, folder, manifest), texts)
    if not unchanged:
        try:
            _replace(folder, sources, texts, manifest, copy)
        except OSError as error:
            raise ArcKernelError(f"{error.filename or folder}: cannot be written ({error.strerror}): give another --out") from None
    size, done = sum(f["bytes"] for f in files.values()) / 1e6, "unchanged" if unchanged else "built"
    say(f"{folder}: {len(files)} files, {size:.1f} MB, {done} ({time.perf_counter() - start:.1f} s)")
    return folder


def _is_built(bundle: Bundle, texts: dict[str, str]) -> bool:
    there = {f.relative_to(bundle.folder).as_posix() for f in bundle.folder.rglob("*") if not f.is_dir()}
    if there != {*bundle.manifest["files"], *texts}:  # also a stray file: all of the folder is uploaded
        return False
    try:
        verify(bundle)
    except ArcKernelError:
        return False
    return all((bundle.folder / name).read_bytes() == text.encode() for name, text in texts.items())


def _replace(folder: Path, sources: dict[str, Path], texts: dict[str, str], manifest: dict, copy: Callable) -> None:
    """Make the bundle under a hidden name, check it, and rename it into the place of the old one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        fresh = work / "fresh"
        for path, source in sources.items():
            (fresh / path).parent.mkdir(parents=True, exist_ok=True)
            copy(source, fresh / path)
        for name, text in texts.items():
            (fresh / name).write_bytes(text.encode())
        verify(Bundle(manifest[KIND], fresh, manifest))
        if folder.exists():
            folder.rename(work / "old")
        fresh.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _dump(value: dict) -> str:
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
