"""Profiles: every one loads, goes together with itself, and a wrong value is named.

    python -m pytest tests/test_profiles.py
"""

import subprocess
import sys

import pytest

from arc_kernel.errors import ArcKernelError
from arc_kernel.kaggle import datasets, profiles


def error_of(call, *arguments) -> str:
    with pytest.raises(ArcKernelError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_kaggle_profiles_are_for_the_image_and_the_gpus_kaggle_lends():
    t4, older, l4 = (profiles.load(name) for name in ("kaggle-t4", "kaggle-t4-vllm-0.11", "kaggle-l4"))
    assert (t4.accelerator, t4.gpus, t4.capability, t4.python) == ("NvidiaTeslaT4", 2, "7.5", "3.12")
    assert {"vllm==0.19.1", "torch==2.10.0"} <= set(t4.requirements)
    assert {"vllm==0.11.2", "torch==2.9.0"} <= set(older.requirements)
    assert (older.accelerator, older.image, older.competition) == (t4.accelerator, t4.image, t4.competition)
    assert (l4.accelerator, l4.gpus, l4.capability, l4.requirements) == ("NvidiaL4", 4, "8.9", t4.requirements)


@pytest.mark.parametrize("name", profiles.names())
def test_a_gpu_before_ampere_gets_no_bfloat16_and_triton_attention(name):
    profile = profiles.load(name)
    if profile.capability and float(profile.capability) < 8:
        assert (profile.engine["dtype"], profile.engine["attention_backend"]) == ("float16", "TRITON_ATTN")
    else:
        assert profile.engine["attention_backend"] == ""


@pytest.mark.parametrize("capability, name", [("", "local-cpu"), ("7.5", "kaggle-t4"), ("8.9", "kaggle-l4"), ("9.0", "kaggle-l4"),
                                              ("8.0", "kaggle-t4"), ("6.0", "kaggle-t4")])
def test_a_device_gets_the_arguments_of_its_profile_or_the_nearest_below(capability, name):
    assert profiles.matching(capability).name == name


def test_a_removed_distribution_does_not_count_as_installed():
    there = profiles.installed(profiles.load("kaggle-t4"))
    assert (there["torch"], there["transformers"]) == ("2.10.0", "5.0.0") and "torchao" not in there
    assert profiles.installed(profiles.load("local-cpu")) == {}


def test_unknown_profile_says_which_there_are():
    message = error_of(profiles.load, "kaggle-p100")
    assert message.startswith("profile kaggle-p100: no such profile") and all(name in message for name in profiles.names())


@pytest.mark.parametrize("old, new, said", [
    ('gpus = 2', 'gpus = "2"', "gpus = '2': give int"),
    ('gpus = 2', 'gpus = true', "gpus = True: give int"),
    ('gpus = 2', 'gpus = 0', "gpus, accelerator and capability"),
    ('gpus = 2', 'gpu = 2', "gpu: no such field"),
    ('cuda = "12.8"', '', "cuda: missing"),
    ('cuda = "12.8"', 'cuda = "cu128"', "cuda = 'cu128': give major.minor"),
    ('remove = ["torchao"]', 'remove = "torchao"', "remove = 'torchao': give tuple"),
    ('"x86_64-manylinux_2_35"', '"linux"', "platform = 'linux': give machine-manylinux_2_<minor>"),
    ('"x86_64-manylinux_2_35"', '""', "python and platform: give both"),
    ('"kaggle-gpu.txt"', '"kaggle-tpu.txt"', "image = 'kaggle-tpu.txt': no such file"),
    ('title = "Kaggle notebook, two T4s, vLLM 0.19.1"', 'title = ', "mend the file"),
    ('[kaggle-l4]\nlike = "kaggle-t4"', '[kaggle-l4]\nlike = "local-cpu"', "like = 'local-cpu': name a profile that is complete"),
])
def test_a_wrong_value_is_named(tmp_path, old, new, said):
    text = profiles.FILE.read_text()
    assert old in text
    file = tmp_path / "profiles.toml"
    file.write_text(text.replace(old, new))
    message = error_of(profiles.load, "kaggle-l4" if "kaggle-l4" in old else "kaggle-t4", file)
    assert message.startswith(str(file)) and said in message


def test_profiles_are_read_from_a_code_bundle_on_a_bare_python(tmp_path):
    """-I and -S: only the standard library and the bundle, as on Kaggle before anything is installed."""
    code = datasets.build_code(tmp_path, "someone", lambda line: None)
    program = (f"import sys; sys.dont_write_bytecode = True; sys.path.insert(0, {str(code)!r})\n"
               "from arc_kernel.kaggle import profiles\n"
               "print(profiles.HERE, profiles.load('kaggle-t4').title, len(profiles.installed(profiles.load('kaggle-t4'))), sep='|')")
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    here, title, count = done.stdout.strip().split("|")
    assert (here, title) == (str(code / "arc_kernel" / "kaggle"), profiles.load("kaggle-t4").title) and int(count) > 700
