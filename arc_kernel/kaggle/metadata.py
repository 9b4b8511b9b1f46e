"""kernel-metadata.json from a Profile, and every fault of a dataset or kernel folder before Kaggle sees it.

Knows Kaggle's fields and limits as of kaggle 2.2.5 (kaggle_api_extended.py: dataset_create_new, kernels_push) and
kagglesdk 0.1.38. Nothing here uses the network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .. import bundle
from ..errors import ArcKernelError, counted
from ..files import read_json
from .leaks import leaks
from .profiles import Profile
from .templates import LICENCES, USERNAME, check_username, slug

DATASET, KERNEL = bundle.METADATA, "kernel-metadata.json"
TITLE = "arc-kernel submission"
SHAPES = ("NvidiaTeslaT4", "NvidiaL4")  # https://github.com/Kaggle/kaggle-cli/blob/main/docs/kernels_metadata.md; T4 means two
SLUG = r"[a-z0-9]+(?:-[a-z0-9]+)*"
REF = rf"[A-Za-z0-9_-]+/{SLUG}"
PINNED = r"\S+@sha256:[0-9a-f]{64}"  # an image that stays the same
PROFILE_LINE = re.compile(rb'("profile = \\")([^"\\]*)(\\")')  # of the notebook's first code cell, in the JSON text
STAYS = "original"  # docker_image_pinning_type: the first push's image; valid_push_pinning_types in kaggle_api_extended.py
LEFT_OUT = (".git", ".cache", ".huggingface")  # folders the client skips: DEFAULT_IGNORE_PATTERNS in kaggle_api_extended.py
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z")  # unpacked on arrival: https://www.kaggle.com/docs/datasets


def kernel(profile: Profile, username: str, datasets: Sequence[str], code_file: str = "submission.ipynb") -> dict:
    """Kaggle's kernel metadata: a private notebook without internet on the profile's machine, image and competition.

    `datasets` are ids `<user>/<slug>`; the kernel's slug is its title's, as Kaggle makes it. Without an image in the profile
    the kernel keeps the one of its first push. Raises ArcKernelError for a bad user name and an image without its digest.
    """
    check_username(username)
    if profile.docker_image and not re.fullmatch(PINNED, profile.docker_image):
        raise ArcKernelError(f"--docker-image: {profile.docker_image!r} is not pinned: give <image>@sha256:<digest>")
    image = {"docker_image": profile.docker_image} if profile.docker_image else {"docker_image_pinning_type": STAYS}
    return {"id": f"{username}/{slug(TITLE)}", "title": TITLE, "code_file": code_file, "language": "python", "kernel_type": "notebook",
            "is_private": True, "enable_gpu": bool(profile.gpus), "enable_tpu": False, "enable_internet": False,
            "machine_shape": profile.accelerator, **image, "dataset_sources": list(datasets),
            "competition_sources": [profile.competition] if profile.competition else [], "kernel_sources": [], "model_sources": []}


def write_kernel(folder: Path, notebook: Path, profile: Profile, username: str, datasets: Sequence[str],
                 say: Callable[[str], None] = print) -> Path:
    """Write `notebook`, with the profile as its parameter, and its kernel-metadata.json into `folder`; returns the folder.

    `say` gets one line on what was done. Raises ArcKernelError as `kernel` does, when the notebook is missing, and when the
    folder cannot be written.
    """
    folder, notebook = Path(folder), Path(notebook)
    text = json.dumps(kernel(profile, username, datasets, notebook.name), indent=1) + "\n"
    try:
        code = PROFILE_LINE.sub(rb"\g<1>" + profile.name.encode() + rb"\3", notebook.read_bytes())
        files = {folder / notebook.name: code, folder / KERNEL: text.encode()}
        fresh = [file for file, data in files.items() if not file.is_file() or file.read_bytes() != data]
        folder.mkdir(parents=True, exist_ok=True)
        for file in fresh:
            file.write_bytes(files[file])
    except OSError as error:
        raise ArcKernelError(f"{error.filename or folder}: {error.strerror}: give a notebook and a folder that can be written") from None
    say(f"{folder}: {counted(len(files), 'file')}, {counted(len(datasets), 'dataset')}, {'built' if fresh else 'unchanged'}")
    return folder


def faults(folder: Path) -> list[str]:
    """A line `file: what is wrong: what to do` for each reason not to upload this dataset or kernel folder; empty if none."""
    folder = Path(folder)
    path = folder / (KERNEL if (folder / KERNEL).is_file() else DATASET)
    if not folder.is_dir():
        return [f"{folder}: no such folder: build it first (python build_kernel.py)"]
    if not path.is_file():
        return [f"{folder}: neither {DATASET} nor {KERNEL} in it: build it first (python build_kernel.py)"]
    try:
        data = read_json(path)
    except (OSError, ValueError) as error:
        return [f"{path}: not JSON ({error}): build it again"]
    if not isinstance(data, dict):
        return [f"{path}: not a JSON object: build it again"]
    found = _kernel(folder, data) if path.name == KERNEL else (*_dataset(data), *_contents(folder, data))
    return [f"{path}: {line}" for line in (*_named(data, 5 if path.name == KERNEL else 6), *found)] + leaks(folder)


def check(folder: Path) -> None:
    """Raise ArcKernelError with the first fault of `folder` and how many more there are."""
    if found := faults(folder):
        raise ArcKernelError(found[0] + (f" (and {len(found) - 1} more faults)" if len(found) > 1 else ""))


def _named(data: dict, least: int) -> Iterator[str]:
    """Faults of `title` and `id`; `least` is the fewest characters of either (kernels 5, datasets 6; 50 at most)."""
    title, ref = data.get("title"), data.get("id")
    if not isinstance(title, str) or not title.strip():
        yield f"no title: give one of {least} to 50 characters"
    elif not least <= len(title) <= 50:
        yield f"title has {len(title)} characters: give {least} to 50"
    elif title.startswith("INSERT_") or "{" in title:
        yield f"title {title!r} is a template's: give a title"
    if not isinstance(ref, str) or ref.count("/") != 1 or not all(ref.split("/")):
        yield f"id {ref!r} is not <user>/<slug>: give your Kaggle user name and a slug"
        return
    user, slug = ref.split("/")
    if user == USERNAME or not re.fullmatch(r"[A-Za-z0-9_-]+", user):
        yield f"id names no user ({user}): build again with --username <your Kaggle user name>"
    if not re.fullmatch(SLUG, slug):
        yield f"slug {slug!r} may hold lowercase letters, digits and single hyphens only: rename it"
    elif not least <= len(slug) <= 50:
        yield f"slug {slug} has {len(slug)} characters: give {least} to 50"


def _dataset(data: dict) -> Iterator[str]:
    licences, subtitle, description = data.get("licenses"), data.get("subtitle"), data.get("description")
    if not isinstance(licences, list) or len(licences) != 1 or not isinstance(licences[0], dict) or not licences[0].get("name"):
        yield 'licenses must name exactly one licence: give [{"name": "apache-2.0"}] or another of Kaggle\'s names'
    elif licences[0]["name"] not in LICENCES:
        yield f"Kaggle knows no licence {licences[0]['name']!r}: give one of {', '.join(LICENCES)}"
    elif licences[0]["name"] == "unknown":
        yield "licence unknown: build with --licence (an adapter: --adapter-licence), or say `license:` at the top of its README.md"
    elif licences[0]["name"] == "other" and "licence" not in str(description).lower() and "license" not in str(description).lower():
        yield "licence other, which the description must name: say it there"
    if subtitle is not None and (not isinstance(subtitle, str) or not 20 <= len(subtitle) <= 80):
        yield f"subtitle has {len(str(subtitle))} characters: give 20 to 80, or leave it out"
    if not isinstance(description, str) or not description.strip():
        yield "no description: say what the dataset holds, its source and its licence"
    elif "Source: not stated" in description or "Trained on: not stated" in description:
        yield "source not stated: build with --source (an adapter: --adapter-source), or say `base_model:` at the top of its README.md"


def _contents(folder: Path, data: dict) -> Iterator[str]:
    """Faults of what a dataset folder holds: the notebook finds a bundle by its manifest and reads what that lists."""
    try:
        manifest = read_json(folder / bundle.MANIFEST)
        files, name = manifest["files"] if manifest[bundle.KIND] in bundle.KINDS else None, manifest["name"]
    except (OSError, ValueError, KeyError, TypeError):
        files = name = None
    if not bundle.complete(files):
        yield f"{bundle.MANIFEST} is missing or damaged: {bundle.AGAIN.split(' and')[0]}"
        return
    if "/" in str(data.get("id")) and str(data["id"]).rpartition("/")[2] != name:
        yield f"its id does not end in {name}, the bundle's name in {bundle.MANIFEST}: {bundle.AGAIN.split(' and')[0]}"
    files = set(files)
    there = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()} - {bundle.MANIFEST, DATASET}
    for what, names in ((f"in {bundle.MANIFEST} but not in the folder", files - there), (f"not in {bundle.MANIFEST}", there - files)):
        if names:
            yield f"{min(names)} is {what} ({len(names)} such): build the bundle again"
    for name in sorted(files):
        if any(part in LEFT_OUT for part in name.split("/")[:-1]):
            yield f"{name} lies in a folder Kaggle's client leaves out: move it"
        elif "/" not in name and name.endswith(ARCHIVES):
            yield f"{name} would be unpacked by Kaggle: put its contents into the bundle"


def _kernel(folder: Path, data: dict) -> Iterator[str]:
    title, code = data.get("title"), data.get("code_file")
    if isinstance(title, str) and title.strip() and "/" in str(data.get("id")) and str(data["id"]).rpartition("/")[2] != slug(title):
        yield f"slug is not the title's: set id to <user>/{slug(title)}, or Kaggle makes another kernel"
    if not isinstance(code, str) or not code.endswith(".ipynb"):
        yield f"code_file {code!r} is no notebook: give an .ipynb"
    elif not (folder / code).is_file():
        yield f"code_file {code} is not in the folder: copy it there (python -m arc_kernel notebook writes it)"
    for field, expected in (("language", "python"), ("kernel_type", "notebook")):
        if data.get(field) != expected:
            yield f"{field} {data.get(field)!r}: set it to {expected!r}"
    flags = {field: _flag(data.get(field)) for field in ("is_private", "enable_gpu", "enable_internet")}
    defaults = {"is_private": "true", "enable_gpu": "false", "enable_internet": "true"}  # kernels_push in kaggle_api_extended.py
    for field, flag in flags.items():
        if flag is None:
            yield f"{field} is not true or false, and absent means {defaults[field]}: write it"
    yield from _machine(data, flags["enable_gpu"])
    if flags["enable_internet"] and data.get("competition_sources"):
        yield "enable_internet is true, which a code competition does not take: set it to false"
    yield from _sources(data)


def _machine(data: dict, gpu: bool | None) -> Iterator[str]:
    shape, image, pinning = (data.get(field) for field in ("machine_shape", "docker_image", "docker_image_pinning_type"))
    if gpu and not shape:
        yield f"enable_gpu without machine_shape, and Kaggle chooses the GPU: set it to one of {', '.join(SHAPES)}"
    elif shape and shape not in SHAPES:
        yield f"machine_shape {shape!r} is retired or unknown, and Kaggle would take another: set it to one of {', '.join(SHAPES)}"
    elif shape and gpu is False:
        yield f"enable_gpu is false but machine_shape is {shape}: set enable_gpu to true"
    if not (pinning == STAYS if image is None else pinning is None and re.fullmatch(PINNED, str(image))):
        yield (f"docker_image {image!r}, docker_image_pinning_type {pinning!r}: is not pinned: give <image>@sha256:<digest> alone "
               f"(--docker-image), or the type {STAYS} alone")


def _sources(data: dict) -> Iterator[str]:
    datasets, competitions = data.get("dataset_sources"), data.get("competition_sources")
    if not isinstance(datasets, list) or not datasets:
        yield "no dataset_sources, so the notebook would find no bundle: name the code and weights datasets"
    else:
        for source in datasets:
            if not re.fullmatch(rf"{REF}(?:/\d+)?", str(source)) or str(source).startswith(USERNAME):
                yield f"dataset source {source!r} is not <user>/<slug>: write the dataset's id"
    if not isinstance(competitions, list) or not competitions:
        yield "no competition_sources, so the notebook would find no tasks: name the competition"
    else:
        for source in competitions:
            if not re.fullmatch(SLUG, str(source)):
                yield f"competition source {source!r} is no slug: give the last part of the competition's address"


def _flag(value) -> bool | None:
    """What the client reads as true or false (get_bool in kaggle_api_extended.py), else None."""
    return value if isinstance(value, bool) else {"true": True, "false": False}.get(str(value).lower())
