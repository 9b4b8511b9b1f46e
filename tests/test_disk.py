"""Where adapters lie, what they need and what remains: `python -m pytest tests/test_disk.py`."""

import shutil
from collections import namedtuple

import pytest
import torch

from arc_kernel import adapt, disk
from arc_kernel.errors import ArcKernelError
from models import tiny_model

Usage = namedtuple("Usage", "total used free")


def test_adapter_size_is_that_of_peft(model_folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    from arc_kernel.checkpoint import load_model

    folder = tiny_model(model_folder, tmp_path / "tiny")
    made = get_peft_model(load_model(folder, "float32", "cpu"), LoraConfig(r=4, target_modules=list(adapt.TARGET_MODULES)))
    weights = sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert disk.adapter_bytes(folder, 4, adapt.TARGET_MODULES) == weights * torch.float32.itemsize


def test_runs_that_may_not_continue_each_other_do_not_share_adapters(tmp_path):
    places = {disk.adapters_folder(tmp_path / "out", str(tmp_path), {"ttt_steps": steps}) for steps in (1, 2)}
    assert len(places) == 2 and all(p.parent.parent == tmp_path for p in places)
    assert disk.adapters_folder(tmp_path / "out", "", {"ttt_steps": 1}) == tmp_path / "out" / "adapters"


def test_forecast_says_for_how_many_tasks_the_disk_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(20e9, 10e9, 10e9))
    assert (disk.forecast(200, 39_000_000, tmp_path / "not" / "there")
            == f"200 adapters of 39 MB: 7.8 GB, of 10.0 GB that are free in {tmp_path}/not/there")
    assert disk.forecast(240, 39_000_000, tmp_path).endswith("enough for 205: give another scratch, or a smaller lora_rank")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(20e9, 19e9, 1e9))
    assert "enough for 0: give" in disk.forecast(10, 39_000_000, tmp_path)


def test_folder_is_made_anew_only_where_it_is_ones_own(tmp_path):
    for folder in (tmp_path / "new", tmp_path / "new"):
        disk.make_anew(folder, "mark")
        assert not list(folder.iterdir())
        (folder / "mark").touch()
        (folder / "other").touch()
    (tmp_path / "new" / "mark").unlink()
    with pytest.raises(ArcKernelError, match="in the way, and not made by this script"):
        disk.make_anew(tmp_path / "new", "mark")
    assert (tmp_path / "new" / "other").exists()
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "mark").touch()
    (tmp_path / "link").symlink_to(tmp_path / "large")
    disk.make_anew(tmp_path / "link", "mark")
    assert (tmp_path / "link").is_symlink() and not list((tmp_path / "large").iterdir())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArcKernelError, match="Not a directory.: give another --out"):
        disk.make_anew(tmp_path / "file" / "below", "mark")
    with pytest.raises(ArcKernelError, match="in the way"):
        disk.make_anew(tmp_path / "file", "mark")
    assert (tmp_path / "file").read_text() == "mine"
