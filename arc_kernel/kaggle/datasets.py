"""Folders that become Kaggle datasets: the package, a model's weights, an adapter; each with a manifest of every byte.

Building is for a clone; on Kaggle `bundle` finds them again. Knows nothing of tasks, prompts or runs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from .. import __version__, checkpoint
from ..bundle import DATASETS, KIND, MANIFEST, METADATA, Bundle, sha256, verify
from ..errors import ArcKernelError, counted
from ..grids import GridEncoder
from ..prepare.needed import check_weights
from ..prompts import PromptBuilder
from ..trained_prompt import FRESH, recorded
from . import templates

PACKAGE = Path(__file__).resolve().parent.parent
PARTS = (".py", ".toml", ".txt", ".json", ".c", ".h")  # what the package is made of: modules, profiles, lists of packages, tiles, C


def build_code(out: Path, username: str = templates.USERNAME, say: Callable[[str], None] = print) -> Path:
    """Write the package, its requirements and the notebook's source as `out`/arc-kernel-code; returns that folder.

    `say` gets one line on what was done. Raises ArcKernelError for a bad user name, a broken metadata template, a folder
    in the way that is no bundle, or an `out` that cannot be written.
    """
    sources = {f"{PACKAGE.name}/{f.relative_to(PACKAGE).as_posix()}": f for f in PACKAGE.rglob("*")
               if f.suffix in PARTS and f.is_file() and not f.name.startswith(".")  # editors' locks
               and not f.parent.name.startswith(".")}  # Jupyter's checkpoints
    beside = {name: PACKAGE.parent / name for name in ("requirements.txt", "requirements-cpu.txt", "notebooks/submission.py")}
    sources |= {name: file for name, file in beside.items() if file.is_file()}
    return build(Path(out) / DATASETS["code"], "code", {}, sources, username, say)


def build_weights(out: Path, model: str, username: str = templates.USERNAME, say: Callable[[str], None] = print,
                  origin: templates.Origin = templates.Origin(), adapter: str = "") -> Path:
    """Write the config, tokenizer, safetensors and licence of `model` as `out`/arc-kernel-<model name>; returns that folder.

    What `origin` leaves open is taken from the model folder's README.md; the embedded model's is known. `say` also gets a line
    where the notebook could not ask the model, alone or with `adapter`, before a prompt is chosen in it. Raises ArcKernelError
    as `checkpoint.open_model` and `build_code` do, for weights that are not the config's, a tokenizer that cannot be loaded, and for a
    name Kaggle would not take.
    """
    folder = checkpoint.open_model(model)
    if model != checkpoint.EMBEDDED:  # which was looked through when it was converted
        check_weights(folder)
        tokenizer = checkpoint.load_tokenizer(folder)
        if not recorded(model, adapter):
            _note_prompt(tokenizer, say)
    known = templates.SMOLLM2 if model == checkpoint.EMBEDDED else templates.model_card(folder)
    return _build_trained(out, "weights", "model", folder, (*checkpoint.TEXTS, checkpoint.WEIGHTS), username, say, origin, known)


def _note_prompt(tokenizer, say: Callable[[str], None]) -> None:
    """Say what to do where a model that was fine-tuned with no prompt cannot be asked in a chat template."""
    try:
        PromptBuilder(tokenizer, GridEncoder.from_name(FRESH["grid_encoder"]), FRESH["prompt"])
    except ArcKernelError as error:
        say(f'note: {error}: write prompt = "compact" in the notebook\'s first cell, or prepare the model with --chat-template')


def build_adapter(out: Path, folder: Path, username: str = templates.USERNAME, say: Callable[[str], None] = print,
                  origin: templates.Origin = templates.Origin()) -> Path:
    """Write the config, safetensors and licence of a trained peft LoRA as `out`/arc-kernel-adapter-<name>; returns that folder.

    What `origin` leaves open is taken from the adapter's README.md. Raises ArcKernelError as `checkpoint.check_adapter` and
    `build_code` do, and for a name Kaggle would not take.
    """
    folder = Path(folder)
    checkpoint.check_adapter(folder)
    return _build_trained(out, "adapter", "adapter", folder, checkpoint.ADAPTER, username, say, origin, templates.model_card(folder))


def trained_name(kind: str, folder: str | Path) -> str:
    """The dataset name of a `weights` or `adapter` bundle, after its `folder`; ArcKernelError for one Kaggle would not take."""
    label = _label(folder)
    before = "arc-kernel-" if kind == "weights" else f"arc-kernel-{kind}-"
    name = before + templates.slug(label)
    taken = kind == "weights" and re.match(r"arc-kernel-(?:(?:code|notebook)$|adapter-|wheels-)", name)
    if taken or not len(before) < len(name) <= 50:
        most = 50 - len(before)
        raise ArcKernelError(f"{folder}: its name makes no Kaggle dataset id ({name}): rename the folder, at most {most} letters")
    return name


def _label(folder: str | Path) -> str:
    """What a model or adapter is called: its folder's name, or that of the run which `finetune` left it in as "adapter" or "model"."""
    path = Path(os.path.abspath(folder))
    return path.parent.name if path.name in ("adapter", "model") else path.name


def build(folder: Path, kind: str, extra: dict, sources: dict[str, Path], username: str, say: Callable[[str], None],
          origin: templates.Origin = templates.Origin(), copy: Callable[[Path, Path], object] = shutil.copyfile) -> Path:
    """Put `sources` (path in the bundle -> file) into `folder` with manifest and metadata, unless it is there already.

    `extra` goes into the manifest, `origin` into the metadata, `copy` takes source and destination. Raises ArcKernelError
    as `build_code` does.
    """
    start = time.perf_counter()
    metadata = templates.fill(kind, folder.name, username, origin)
    files = {path: {"sha256": sha256(source), "bytes": source.stat().st_size} for path, source in sources.items()}
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
    say(f"{folder}: {counted(len(files), 'file')}, {size:.1f} MB, {done} ({time.perf_counter() - start:.1f} s)")
    return folder


def _build_trained(out: Path, kind: str, inside: str, folder: Path, patterns: tuple[str, ...], username: str,
                   say: Callable[[str], None], origin: templates.Origin, known: templates.Origin) -> Path:
    """The bundle of what matches `patterns` in `folder`, put into the folder `inside` of it."""
    origin = templates.Origin(origin.licence or known.licence, origin.source or known.source)
    sources = {f"{inside}/{f.name}": f for pattern in patterns for f in folder.glob(pattern) if f.is_file()}
    if origin.licence.lower() == "apache-2.0" and not list(folder.glob("LICENSE*")):
        sources["LICENSE"] = templates.APACHE
    return build(Path(out) / trained_name(kind, folder), kind, {inside: _label(folder)}, sources, username, say, origin)


def _is_built(bundle: Bundle, texts: dict[str, str]) -> bool:
    there = {f.relative_to(bundle.folder).as_posix() for f in bundle.folder.rglob("*") if f.is_symlink() or not f.is_dir()}
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
