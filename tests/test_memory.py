"""Memory kept from step to step and given back: `python -m pytest tests/test_memory.py`."""

import gc
import importlib
import json
import subprocess
import sys

import pytest

from arc_kernel import memory
from arc_kernel.memory import available_memory, importing

# As training does: arrays beyond the 32 MB up to which glibc keeps what is freed, the same again and again.
STEPS = """
import json, resource, sys
import numpy as np
from arc_kernel.memory import free_memory, keep_memory

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024

if sys.argv[1] == "kept":
    keep_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = resident()
for step in range(6):
    if step == 1:
        begun = faults()
    held = [np.ones(16 << 20, np.float32) for _ in range(3)]
    del held
seen, kept = faults() - begun, resident() - before
free_memory()
print(json.dumps({"faults": seen, "kept": kept, "left": resident() - before}))
"""


def run(way: str) -> dict:
    return json.loads(subprocess.run([sys.executable, "-c", STEPS, way], check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_step_asks_the_system_for_no_memory_once_it_had_it_and_a_stage_gives_it_back():
    plain, kept = run("plain"), run("kept")
    assert kept["faults"] < 0.1 * plain["faults"] and kept["kept"] > 150
    assert kept["left"] < 30


def test_no_garbage_is_looked_for_while_a_library_is_imported_the_first_time(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, ends in (("whole", ""), ("broken", "raise ValueError")):
        (tmp_path / f"{name}_library.py").write_text(f"import gc\nlooked = gc.isenabled()\n{ends}")
    frozen = gc.get_freeze_count()
    try:
        with importing("whole_library"):
            assert not importlib.import_module("whole_library").looked
        with importing("whole_library"):
            assert gc.isenabled()
        assert gc.isenabled() and gc.get_freeze_count() > frozen
        with pytest.raises(ValueError), importing("broken_library"):
            importlib.import_module("broken_library")
        assert gc.isenabled()
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("asked, kept", [("", 1), ("1", 0)])
def test_a_library_keeps_its_bytecode_where_this_process_writes_none_unless_the_user_wants_none(asked, kept, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", asked)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    name = f"library_with_bytecode_{kept}"
    (tmp_path / f"{name}.py").touch()
    try:
        with importing(name):
            importlib.import_module(name)
    finally:
        gc.unfreeze()
    assert len(list(tmp_path.rglob("*.pyc"))) == kept and sys.dont_write_bytecode


def test_memory_for_others_is_what_the_system_has_left_or_a_container_where_that_is_less(monkeypatch, tmp_path):
    files = {"/proc/meminfo": "MemTotal:       24000 kB\nMemAvailable:   9000 kB\n",
             "/sys/fs/cgroup/memory.max": "max\n", "/sys/fs/cgroup/memory.current": "3000000\n",
             "/sys/fs/cgroup/memory.stat": "inactive_file 1000000\nactive_file 7\n"}

    class There(type(tmp_path)):
        def read_text(self):
            if str(self) not in files:
                raise FileNotFoundError(self)
            return files[str(self)]

    monkeypatch.setattr(memory, "Path", There)
    assert available_memory() == 9000 * 1024
    files["/sys/fs/cgroup/memory.max"] = "8000000\n"
    assert available_memory() == 8000000 - 3000000 + 1000000
    files["/sys/fs/cgroup/memory.max"] = "1\n"
    assert available_memory() == 0
    files.clear()
    assert available_memory() == 0
