"""A submission as a whole: which datasets its notebook names, what is wrong with any of them, their upload.

The notebook's kernel-metadata.json says what belongs together. Knows folders and ids; what is in them is for `bundle` and
`wheels` to know, what Kaggle takes for `metadata`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from .. import bundle
from ..errors import ArcKernelError
from . import datasets, metadata, profiles, push, templates, wheels

NOTEBOOK = "arc-kernel-notebook"
SOURCE = datasets.PACKAGE.parent / "notebooks" / "submission.ipynb"


def build_notebook(out: Path, profile: profiles.Profile, model: str, adapter: str = "", username: str = templates.USERNAME,
                   say: Callable[[str], None] = print) -> Path:
    """Write the notebook as `out`/arc-kernel-notebook, with the profile's machine and its datasets; returns that folder.

    `adapter` is the folder of a trained LoRA, or empty. Raises ArcKernelError as `metadata.write_kernel` does, and for a
    folder whose name makes no dataset id.
    """
    trained = [datasets.trained_name("weights", model), *([datasets.trained_name("adapter", adapter)] if adapter else [])]
    names = [wheels.name(profile), *trained, bundle.DATASETS["code"]]
    return metadata.write_kernel(Path(out) / NOTEBOOK, SOURCE, profile, username, [f"{username}/{name}" for name in names], say=say)


def check(out: Path, say: Callable[[str], None] = print) -> list[str]:
    """Every fault of the notebook in `out` and of its datasets, to the last byte, a line each with its mend.

    Without a notebook all datasets in `out` are looked at. `say` gets a line for each folder without a fault.
    """
    found = []
    for folder, expected in (*_datasets(out), (Path(out) / NOTEBOOK, "")):
        faults = metadata.faults(folder) or (_of_dataset(folder, expected) if folder.name != NOTEBOOK else [])
        if not faults:
            say(f"{folder}: no fault")
        found += faults
    return found


def push_all(out: Path, message: str = "", dry_run: bool = False, say: Callable[[str], None] = print,
             again: bool = False) -> list[str]:
    """Upload the datasets of the notebook in `out`, wheels first, then push it; returns the ids that were uploaded.

    What Kaggle has already is left alone, unless `again`.
    Raises ArcKernelError as `push.push` does.
    """
    notebook = Path(out) / NOTEBOOK
    metadata.check(notebook)
    return push.push([folder for folder, _ in _datasets(out)], notebook, message=message, dry_run=dry_run, say=say, again=again)


def _datasets(out: Path) -> list[tuple[Path, str]]:
    """Folder and id of each dataset that the notebook in `out` names and its user owns; without a notebook, each there is."""
    try:
        data = json.loads((Path(out) / NOTEBOOK / metadata.KERNEL).read_text(encoding="utf-8"))
        owner = data["id"].split("/")[0]
        ids = [source.split("/") for source in data["dataset_sources"]]
        return [(Path(out) / name, f"{user}/{name}") for user, name, *_ in ids if user == owner]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [(file.parent, "") for file in sorted(Path(out).glob(f"*/{metadata.DATASET}"))]


def _of_dataset(folder: Path, expected: str) -> list[str]:
    """What `metadata.faults` does not see: another id than the notebook's, changed bytes, wheels that would not work."""
    manifest = json.loads((folder / bundle.MANIFEST).read_bytes())
    actual = json.loads((folder / metadata.DATASET).read_text(encoding="utf-8"))["id"]
    if expected and actual != expected:
        return [f"{folder / metadata.DATASET}: its id is {actual}, the notebook names {expected}: build all with one --username"]
    try:
        bundle.verify(bundle.Bundle("", folder, manifest))
        if manifest.get(bundle.KIND) != "wheels":
            return []
        profile = profiles.load(str(manifest.get("profile")))
        return [f"{folder}: {fault}: {wheels.renewed(profile)}" for fault in wheels.faults((folder / "wheels").glob("*.whl"), profile)]
    except ArcKernelError as error:
        return [str(error)]
