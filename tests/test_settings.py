"""Settings are checked before anything is done with them: `python -m pytest tests/test_settings.py`."""

import dataclasses
import json
import math

import pytest

from arc_kernel.errors import ArcKernelError
from arc_kernel.settings import Settings


def message_of(call, *args, **kwargs):
    with pytest.raises(ArcKernelError) as raised:
        call(*args, **kwargs)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("name, value, wanted", [
    ("views", "8", "int"), ("views", 8.0, "int"), ("views", True, "int"), ("views", None, "int"),
    ("ttt_lr", "1e-3", "float"), ("ttt_lr", True, "float"), ("tasks", 3, "str"), ("out", None, "str"), ("time_budget", 10**400, "float"),
    ("out", "runs/\0", "NUL"),
])
def test_a_value_of_the_wrong_type_is_named_with_the_type_it_should_have(name, value, wanted):
    message = message_of(Settings, **{name: value})
    assert name in message and repr(value) in message and wanted in message


@pytest.mark.parametrize("name, value", [
    ("limit", -1), ("seed", -1), ("devices", -1), ("devices", 65), ("max_seq_len", 255), ("ttt_steps", -1), ("ttt_lr", -1e-9),
    ("ttt_lr", 1.5), ("ttt_lr", math.nan), ("ttt_lr", math.inf), ("time_budget", math.inf), ("ttt_batch", 0),
    ("lora_rank", 0), ("lora_rank", 513), ("views", 0), ("max_new_tokens", -1),
])
def test_a_value_out_of_bounds_is_named_with_its_bounds(name, value):
    low = next(f.metadata["low"] for f in dataclasses.fields(Settings) if f.name == name)
    message = message_of(Settings, **{name: value})
    assert f"{name} is {value}" in message and f"{low} or more" in message


@pytest.mark.parametrize("name, value", [
    ("limit", 0), ("devices", 0), ("devices", 64), ("max_seq_len", 256), ("ttt_steps", 0), ("ttt_lr", 0.0), ("ttt_lr", 1.0),
    ("lora_rank", 512), ("views", 1),
])
def test_bounds_themselves_are_allowed(name, value):
    assert getattr(Settings(**{name: value}), name) == value


def test_a_whole_number_is_taken_where_a_float_is_wanted():
    assert type(Settings(ttt_lr=1).ttt_lr) is float


@pytest.mark.parametrize("name", ["backend", "dtype", "prompt", "background"])
def test_a_value_outside_the_choices_is_named_with_the_choices(name):
    choices = next(f.metadata["choices"] for f in dataclasses.fields(Settings) if f.name == name)
    message = message_of(Settings, **{name: "nonsense"})
    assert name in message and all(choice in message for choice in choices)
    assert [getattr(Settings(**{name: c}), name) for c in choices] == list(choices)


def test_every_unknown_parameter_is_named_beside_the_known_ones():
    message = message_of(Settings.from_parameters, {"view": 3, "steps": 2, "views": 4})
    assert "unknown parameter steps, view:" in message and "ttt_steps" in message


def test_parameters_become_settings_and_the_rest_keeps_its_default():
    assert Settings.from_parameters({"views": 3, "ttt_lr": 1e-3}) == Settings(views=3, ttt_lr=1e-3)


def test_settings_json_holds_every_setting_and_reads_back_as_the_same_settings():
    settings = Settings(tasks="some.json", ttt_lr=1e-3, views=3)
    assert Settings.from_parameters(json.loads(settings.to_json())) == settings


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().views = 0


def test_differences_name_what_changes_answers_and_leave_out_where_and_on_how_many_devices():
    here, there = Settings(out="a", devices=1, views=4, model="m"), Settings(out="b", devices=2, views=8, model="n")
    assert here.differences(there) == ["model: 'm' vs 'n'", "views: 4 vs 8"]
    assert here.differences(Settings(out="c", devices=7, views=4, model="m")) == []
    assert {f.name for f in dataclasses.fields(Settings) if not f.metadata["resume"]} == {
        "tasks", "solutions", "out", "scratch", "devices", "early_stop", "time_budget"}


def test_every_setting_has_a_help_line():
    assert [f.name for f in dataclasses.fields(Settings) if not f.metadata["help"]] == []
