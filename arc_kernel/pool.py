"""Worker processes: started with their own device or cores, fed from one queue in the order it is given.

Two stages share the workers: no task is answered before every task is adapted, so a worker that runs out of tasks to
adapt is told so, and starts its engine meanwhile. A worker that dies is replaced and its tasks are tried once more, after
all others and each by itself, so that one which kills workers takes no other with it. Where workers die before any task
is answered it may be vLLM, whose kernels can end a process on a GPU too old for their compiler: the next ones answer
without it. Knows tasks only by id; what they are is sent as JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Callable, Iterator

from .device import cores, gpu_count
from .errors import ArcKernelError, counted

STAGES = ("adapt", "answer")
TRIES = 2  # of a task in a worker that died over it
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG, linux/prctl.h
DEATHS = 3  # of a device's workers with no task finished in between, after which it gets no other
FELL = 2  # workers that died after training with no task answered yet, after which no other gets vLLM
KILLED_WITHIN = 10.0  # seconds a killed worker is waited for
PATIENCE = 60.0  # seconds a worker with nothing left to do is given to end, and its process to go once its pipe is closed
SILENCE = 1200.0  # seconds without a word of a worker that holds tasks, after which it hangs; on a GPU: a step on a CPU may take minutes


class Pool:
    """`devices` workers over `todo[stage]`, lists of task ids in the order in which they are to be given out.

    `share(stage, task)` says how much of the time that is left a worker may take for a task that is given out now (0 to 1).
    """

    def __init__(self, devices: int, job: dict, tasks: dict[str, dict], todo: dict[str, list[str]], logs: Path,
                 share: Callable[[str, str], float]):
        self._share = share
        self.todo = {stage: list(todo[stage]) for stage in STAGES}
        self._job, self._tasks, self._logs = job, tasks, logs
        self._held: dict[int, dict[str, set[str]]] = {}  # worker -> stage -> tasks given out and not yet reported
        self._wanting: dict[int, tuple[str, bool]] = {}  # worker -> stage it waits to get a task of, and whether it asks for a word now
        self._kept: dict[tuple[int, str], str] = {}  # worker, stage -> the task it gets when it asks
        self._tries: Counter = Counter()
        self._open, self._over = {"adapt"}, set()  # stages from which tasks are given out; whose time is over
        self._trained: set[int] = set()  # workers that were told there is nothing left to adapt
        self._heard: dict[int, float] = {}  # worker -> when it last said something, or was given a task (`time.monotonic`)
        self._lost: set[int] = set()  # devices with a process that does not even die when it is killed
        self._fell, self._served = 0, False  # workers that died after training before any task was answered; whether one was
        self._useful = False  # whether a task was finished: what stops a worker later is no setting's fault
        self._messages: queue.Queue = queue.Queue()
        self._processes: dict[int, subprocess.Popen] = {}
        self._devices, self._gpus, self._numbers = devices, gpu_count(), 0
        self._start_all()

    @property
    def workers(self) -> int:
        """How many are at work now, at least 1."""
        return max(1, len(self._processes))

    def events(self, until: str, deadline: float = math.inf, grace: float = 0.0) -> Iterator[dict]:
        """Messages of the workers, each with its `worker`, until the stage `until` ('adapt' or 'answer') has no task left.

        A death is a message of its own: `worker-died`, with the tasks that are given up for this stage. At `deadline`
        (`time.time`) no more tasks are given out, which is told as `out-of-time`; `grace` seconds later what is still
        held is given up. What a worker held that dies after the deadline is not tried again.
        """
        self._open_stage(until, keep=time.time() < deadline)
        while self.todo[until] or any(held[until] for held in self._held.values()):
            now = time.time()
            if now >= deadline:
                self._over.add(until)
            if now >= deadline and self.todo[until]:
                yield {"event": "out-of-time", "stage": until, "tasks": self.todo[until], "held": False,
                       "text": f"time budget: {counted(len(self.todo[until]), 'task')} left out of '{until}'"}
                self.todo[until] = []
                continue
            if now >= deadline + grace:
                held = sorted(task for stages in self._held.values() for task in stages[until])
                yield {"event": "out-of-time", "stage": until, "tasks": held, "held": True,
                       "text": f"time budget: {counted(len(held), 'task')} given up in '{until}': {', '.join(held)}"}
                return
            try:
                end = deadline if now < deadline else deadline + grace
                number, message = self._messages.get(timeout=min(end - now, self._until_silent(until), threading.TIMEOUT_MAX))
            except queue.Empty:
                for number in self._silent(until):
                    yield {"event": "note", "worker": number, "text": f"worker {number} hangs: no word for {SILENCE:g} s: stopped"}
                    self._stop([number])
                    self._heard[number] = time.monotonic()  # its death comes as a message
                continue
            if number not in self._processes:  # buried, though it did not die
                continue
            self._heard[number] = time.monotonic()
            if message is None:
                yield from self._bury(number)
            elif message["event"] == "want":
                self._want(number, message)
            else:
                if message["event"] in ("adapted", "adapt-failed", "answered"):
                    self._deaths[self._processes[number].device] = 0
                    self._useful = self._useful or message["event"] != "adapt-failed"
                    self._served = self._served or message["event"] == "answered"
                    for held in self._held[number].values():
                        held.discard(message["task"])
                yield {"worker": number, **message}
                if message["event"] == "stop" and not self._useful:
                    raise ArcKernelError(message["error"])
            self._give_out()

    def close(self, until: float = math.inf) -> Iterator[dict]:
        """Tell workers there is nothing left, yield what they still say, and wait for them; who does not end in time, before the clock
        `until` (`time.time`) if there is that long, is stopped."""
        self.todo, self._open, patience = {stage: [] for stage in STAGES}, set(STAGES), min(PATIENCE, max(1.0, until - time.time()))
        self._kept.clear()
        end = time.monotonic() + patience
        while self._processes:
            self._give_out()
            try:
                number, message = self._messages.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                yield {"event": "note", "text": f"{counted(len(self._processes), 'worker')} did not end within {patience:.0f} s: stopped"}
                return self.kill()
            if number not in self._processes:
                continue
            if message is None:
                self._reap(number)
            elif message["event"] == "want":
                self._want(number, message)
            else:
                yield {"worker": number, **message}

    def kill(self) -> None:
        """Stop every worker at once."""
        self._stop(list(self._processes))
        self._processes.clear()

    def stop_holders(self, stage: str) -> None:
        """Stop the workers that hold a task of this stage; their deaths are told, and they are replaced, as any other's."""
        self._stop([number for number, held in self._held.items() if held[stage]])

    def _stop(self, numbers: list[int]) -> None:
        for number in numbers:
            self._processes[number].kill()
        for number in numbers:
            if not _ended(self._processes[number], KILLED_WITHIN):
                self._messages.put((number, None))  # which else comes when its pipe is closed

    def _until_silent(self, stage: str) -> float:
        """Seconds until a worker that holds tasks of this stage has said nothing for SILENCE; infinite without GPUs."""
        return max(0.0, min((self._heard[number] for number in self._busy(stage)), default=math.inf) + SILENCE - time.monotonic())

    def _silent(self, stage: str) -> list[int]:
        """The workers that hang in this stage."""
        return [number for number in self._busy(stage) if time.monotonic() >= self._heard[number] + SILENCE]

    def _busy(self, stage: str) -> list[int]:
        """The workers on GPUs that hold tasks of this stage and are not waiting for a word from here."""
        return [number for number, held in self._held.items() if self._gpus and held[stage] and number not in self._wanting]

    def _start_all(self) -> None:
        """A worker for each device, no more than tasks."""
        self._deaths: Counter = Counter()  # by device
        devices = [d for d in range(self._devices) if d not in self._lost]
        for device in devices[: max(1, *map(len, self.todo.values()))]:
            self._start(device)

    def _start(self, device: int) -> None:
        number, self._numbers = self._numbers, self._numbers + 1
        log = open(self._logs / f"worker-{number}.log", "w", encoding="utf-8")
        # -B: no bytecode beside this package, which may be a bundle; libraries keep theirs (`memory.importing`)
        process = subprocess.Popen([sys.executable, "-B", "-m", "arc_kernel.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=log, text=True, encoding="utf-8", env=_environment(device, self._devices, self._gpus),
                                   preexec_fn=_in_the_worker(device, self._devices, self._gpus))
        log.close()
        process.device = device
        self._processes[number], self._held[number], self._heard[number] = process, {stage: set() for stage in STAGES}, time.monotonic()
        backend = {"backend": "transformers"} if self._fell >= FELL else {}
        self._send(number, self._job | {"graphs": not self._deaths[device]} | backend)
        threading.Thread(target=self._listen, args=(number, process.stdout), daemon=True).start()

    def _listen(self, number: int, stdout) -> None:
        with contextlib.suppress(ValueError):  # a line cut short by a kill
            for line in stdout:
                self._messages.put((number, json.loads(line)))
        self._messages.put((number, None))

    def _send(self, number: int, value: dict) -> None:
        with contextlib.suppress(BrokenPipeError):  # its death comes as a message
            stdin = self._processes[number].stdin
            stdin.write(json.dumps(value) + "\n")
            stdin.flush()

    def _open_stage(self, stage: str, keep: bool) -> None:
        """Give out a stage's tasks from now on; with `keep` each worker that has not asked yet has one kept, whatever the others take."""
        if stage not in self._open:
            self._open.add(stage)
            self._give_out()
            for number, held in self._held.items():
                if keep and self.todo[stage] and not held[stage] and self._processes[number].poll() is None:
                    self._kept[number, stage] = self.todo[stage].pop(0)
                    held[stage].add(self._kept[number, stage])
        self._give_out()

    def _want(self, number: int, message: dict) -> None:
        self._wanting[number] = message["stage"], message.get("now", False)

    def _give_out(self) -> None:
        """Answer every waiting worker that can be answered now; one that asks for a word is told where it will be later, one that can
        have nothing beside what it holds to ask again."""
        for number, (stage, now) in list(self._wanting.items()):
            if stage not in self._open:
                if now:
                    del self._wanting[number]
                    self._send(number, {"task": None, "later": True})
                continue
            task_id = self._kept.pop((number, stage), None) or self._next(number, stage)
            reply = {"task": None, "wait": bool(self.todo[stage])}
            if task_id:
                self._heard[number] = time.monotonic()
                self._held[number][stage].add(task_id)
                reply = {"task": self._tasks[task_id], "share": self._share(stage, task_id)}
            elif stage == "adapt":
                self._trained.add(number)
            del self._wanting[number]
            self._send(number, reply)

    def _next(self, number: int, stage: str) -> str | None:
        """Take the task a worker gets out of those that wait: in their order; the smallest after a death on its device, which a
        large one may have caused. Tasks whose worker died come last, each to a worker that holds no other. None: nothing for it now."""
        waiting, held = self.todo[stage], self._held[number][stage]
        fresh = [i for i in waiting if not self._tries[stage, i]]
        if not waiting or held and (not fresh or any(self._tries[stage, i] for i in held)):
            return None
        task_id = (fresh or waiting)[0]
        if fresh and self._deaths[self._processes[number].device]:
            task_id = min(fresh, key=lambda i: len(json.dumps(self._tasks[i])))
        waiting.remove(task_id)
        return task_id

    def _bury(self, number: int) -> Iterator[dict]:
        """Take a dead worker's tasks back, or give them up after TRIES, and see that somebody is there for what waits."""
        kept = {(stage, task) for (worker, stage), task in self._kept.items() if worker == number}  # which it was never given
        process, given_up, all_held = self._reap(number), {stage: [] for stage in STAGES}, self._held.pop(number)
        device = process.device
        if process.returncode == 0 and not any(all_held.values()):  # it was told that nothing is left
            if any(self.todo.values()) and not self._processes:  # what came back from another's death since then
                self._start(device)
            return
        by_vllm = number in self._trained and self._job["backend"] == "vllm" and not self._served
        self._fell += by_vllm
        slower = by_vllm and self._fell == FELL
        for stage, held in all_held.items():
            for task_id in sorted(held):
                self._tries[stage, task_id] += (stage, task_id) not in kept and not slower  # vLLM's fault, by all that is known
                if self._tries[stage, task_id] < TRIES and stage not in self._over:
                    self.todo[stage].insert(0 if (stage, task_id) in kept else len(self.todo[stage]), task_id)
                else:
                    given_up[stage].append(task_id)
        self._deaths[device] += not any(self._tries[stage, i] >= TRIES for stage in STAGES for i in given_up[stage])
        if any(self.todo.values()):
            self._replace(device, given_up)
        status = "its process does not end" if process.returncode is None else f"status {process.returncode}"
        log, lost = self._logs / f"worker-{number}.log", counted(sum(map(len, given_up.values())), "task")
        yield {"event": "worker-died", "worker": number, "returncode": process.returncode, "given_up": given_up,
               "text": f"worker {number} died ({status}, see {log}); given up: {lost}" + "; from now on transformers answers" * slower}

    def _replace(self, device: int, given_up: dict[str, list[str]]) -> None:
        """Start a worker where one died, or on a free device where this one's keep dying and nobody else takes the stage's tasks.

        Where there is none, the tasks that wait for the stage are `given_up`; with nobody left, workers are started once more for the
        next: what cannot train may answer.
        """
        stage, busy = "answer" if "answer" in self._open else "adapt", {p.device for p in self._processes.values()}
        takers = self._processes.keys() - (self._trained if stage == "adapt" else set())
        healthy = [d for d in (device, *range(self._devices)) if self._deaths[d] < DEATHS and d not in busy | self._lost]
        if device in healthy or healthy and not takers:
            self._start(healthy[0])
        elif not takers:
            given_up[stage] += self.todo[stage]
            self.todo[stage] = []
            if any(self.todo.values()) and not self._processes:
                self._start_all()
            for stage in STAGES if not self._processes else ():  # no device is left
                given_up[stage] += self.todo[stage]
                self.todo[stage] = []

    def _reap(self, number: int) -> subprocess.Popen:
        """Forget a worker that has ended; a device whose process does not end gets no other: its memory is still held."""
        process = self._processes.pop(number)
        if not _ended(process, PATIENCE):
            self._lost.add(process.device)
        self._wanting.pop(number, None)
        self._kept = {key: task for key, task in self._kept.items() if key[0] != number}
        return process


def _ended(process: subprocess.Popen, seconds: float) -> bool:
    """Whether a process that was killed, or has closed its pipe, ends in these seconds; one that hangs in a driver does not even die."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _share(device: int, devices: int) -> list[int]:
    return cores()[device::devices] or cores()


def _environment(device: int, devices: int, gpus: int) -> dict[str, str]:
    """One visible GPU, or a share of the cores; this package importable; no word with the network."""
    env = dict(os.environ)
    package = str(Path(__file__).resolve().parent.parent)
    env["PYTHONPATH"] = os.pathsep.join(p for p in (package, env.get("PYTHONPATH")) if p)
    env.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PYTHONUNBUFFERED="1")
    if gpus:
        visible = env.get("CUDA_VISIBLE_DEVICES")
        env["CUDA_VISIBLE_DEVICES"] = visible.split(",")[device] if visible else str(device)
        if devices > 1:  # engines that start together would write one cache of compiled kernels (vLLM issue 24601)
            caches = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            env["VLLM_CACHE_ROOT"] = str(Path(env.get("VLLM_CACHE_ROOT") or caches / "vllm") / f"device-{device}")
    else:
        env["OMP_NUM_THREADS"] = str(len(_share(device, devices)))
    return env


def _in_the_worker(device: int, devices: int, gpus: int):
    """What a worker does before it starts: end when this process is killed, keep to its share of the cores."""
    share = [] if devices == 1 or gpus else _share(device, devices)
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def prepare() -> None:
        if libc:
            libc.prctl(DIE_WITH_PARENT, signal.SIGKILL)  # else it would hold its GPU's memory against the next start
        if share and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, share)

    return prepare
