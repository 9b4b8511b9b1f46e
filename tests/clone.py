"""A clone of this repository in which all of a submission is built in a second, offline.

What is replaced: each wheel of the locks by an empty one of the same name and version, in the cache as after a download,
with the lock's sha256 made to fit; and the embedded model's converted weights by a single small tensor. All else is the
repository's.
"""

import os
import shutil
from pathlib import Path

import numpy
from safetensors.numpy import save_file

from arc_kernel import checkpoint
from arc_kernel.kaggle import lock
from small_wheels import make_wheel

HOME = Path(__file__).resolve().parent.parent
PARTS = ("arc_kernel", "notebooks", "docs", "build_kernel.py", "Makefile", "README.md")
PROFILE = "kaggle-t4"


def make(folder: Path) -> Path:
    """Make the clone as `folder`, with its cache beside it in `folder`.cache; returns `folder`."""
    for name in PARTS:
        copy = shutil.copytree if (HOME / name).is_dir() else shutil.copy
        folder.mkdir(exist_ok=True)
        copy(HOME / name, folder / name)
    for file in HOME.glob("requirements*"):
        shutil.copy(file, folder)
    (folder / "kaggle_datasets").mkdir()
    for file in (file for file in (HOME / "kaggle_datasets").iterdir() if file.is_file()):
        shutil.copy(file, folder / "kaggle_datasets")
    cache = cache_of(folder)
    small_model(cache / f"format-{checkpoint.EMBEDDED_FORMAT}" / checkpoint.EMBEDDED)
    small_lock(folder / f"arc_kernel/kaggle/locks/{PROFILE}.txt", cache / "wheels")
    return folder


def cache_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.cache")


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process in the clone: its cache, nothing of Kaggle's, and no package index."""
    own = ("KAGGLE_", "PYTHON", "MAKE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(own)}
    return kept | {"ARC_KERNEL_CACHE": str(cache_of(folder)), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1",
                   "PIP_NO_INDEX": "1", "UV_OFFLINE": "1", "UV_CACHE_DIR": str(cache_of(folder) / "uv")}


def small_model(folder: Path) -> Path:
    """The smallest folder that `checkpoint.open_model` takes."""
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    save_file({"weight": numpy.zeros(4, numpy.float32)}, folder / "model.safetensors")
    return folder


def small_adapter(folder: Path, card: str = "") -> Path:
    """The smallest folder that `checkpoint.check_adapter` takes, with `card` as its README.md."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "README.md").write_text(card)
    save_file({"lora_A": numpy.zeros(4, numpy.float32)}, folder / "adapter_model.safetensors")
    return folder


def small_lock(file: Path, wheels: Path) -> None:
    """Rewrite the lock for empty wheels of its names and versions, which lie in `wheels` then."""
    from arc_kernel.kaggle.download import hashed

    pins = lock.parse(file.read_text(), file.name)
    file.write_text(lock.render([hashed(pin, make_wheel(wheels, pin.name.replace("-", "_"), pin.version)) for pin in pins], ["small"]))
