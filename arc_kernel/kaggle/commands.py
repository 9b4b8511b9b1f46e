"""A submission as a whole: which datasets its notebook names, what is wrong with any of them, their upload.

The notebook's kernel-metadata.json says what belongs together. Knows folders and ids; what is in them is for `bundle` and
`wheels` to know, what Kaggle takes for `metadata`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from .. import bundle
from ..errors import ArcKernelError
from ..files import read_json
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
        if not faults and folder.name == NOTEBOOK:
            faults = _of_notebook(folder, [] if found else [folder for folder, _ in _datasets(out)])
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
        data = read_json(Path(out) / NOTEBOOK / metadata.KERNEL)
        owner = data["id"].split("/")[0]
        ids = [source.split("/") for source in data["dataset_sources"]]
        return [(Path(out) / name, f"{user}/{name}") for user, name, *_ in ids if user == owner]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [(file.parent, "") for file in sorted(Path(out).glob(f"*/{metadata.DATASET}"))]


def _of_notebook(folder: Path, datasets: list[Path]) -> list[str]:
    """Faults between the sound files of the notebook's `folder` and its sound datasets: what its session would refuse."""
    path = folder / metadata.KERNEL
    data = read_json(path)
    manifests = [read_json(dataset / bundle.MANIFEST) for dataset in datasets]
    made_for = {manifest[bundle.KIND]: manifest.get("profile") for manifest in manifests}
    named = re.search(metadata.PROFILE_LINE, (folder / data["code_file"]).read_bytes())
    name = named[2].decode(errors="replace") if named else ""
    if name not in profiles.names():  # `auto`, or a notebook of somebody's own
        return []
    faults, mend = [], "build all with one --profile"
    if (given := data.get("machine_shape") or "") != (shape := profiles.load(name).accelerator):
        faults.append(f"{path}: machine_shape is {given!r}, that of the notebook's profile {name} is {shape!r}: {mend}")
    if made_for.get("wheels", name) != name:
        faults.append(f"{path}: its wheels are those of profile {made_for['wheels']}, the notebook's is {name}: {mend}")
    if datasets and len(datasets) == len(data["dataset_sources"]):  # else what is missing may be somebody else's
        faults += [f"{path}: no dataset of {kind} among its dataset_sources: build the notebook again"
                   for kind in ("code", "weights", "wheels") if kind not in made_for]
    return faults


def _of_dataset(folder: Path, expected: str) -> list[str]:
    """What `metadata.faults` does not see: another id than the notebook's, changed bytes, wheels that would not work."""
    manifest = read_json(folder / bundle.MANIFEST)
    actual = read_json(folder / metadata.DATASET)["id"]
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
