"""The main job: ARC JSON in, a scored submission.json out.

`Run` walks through the rooms: settings are resolved, a valid submission is written, workers adapt and answer, votes
replace the fallback as they come. The files in the output folder are the state: a killed run started again on it does
only what is missing.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections import defaultdict
from pathlib import Path

from filelock import FileLock, Timeout

from . import adapt, adapter_fit, checkpoint, disk, generate, progress, report, score, select, trained_prompt
from .budget import Budget, share
from .device import cores, cpu_workers, gpu_count
from .errors import ArcKernelError, named_line
from .events import EventLog, read_events, stage_rows
from .files import make_writable, read_json, take_folder, write_json
from .grids import GridEncoder
from .job import Job
from .kaggle import profiles
from .pool import Pool
from .precision import probe
from .precision.verdict import Precision, digest
from .run_folder import stored_settings, tasks_digest
from .settings import Settings
from .stored import Stored
from .tasks import Attempts, cells, load_challenges, task_to_json, write_submission

UNTOLD = ("model", "adapter", "out", "adapters", "adapt_until", "answer_until", "probe_tasks")  # in the log: this machine's own, or long
SUBMISSION_SECONDS = 10.0  # at most so often is submission.json written again while answers arrive


class Run:
    """One run on one output folder: `adapt()`, `answer()`, `finish()`, in this order; `solve` does all three.

    `silent`: nothing is added to the folder's events, as where a run is only looked at.
    """

    def __init__(self, settings: Settings, silent: bool = False):
        self.begun = time.perf_counter()
        settings = trained_prompt.resolved(settings)
        self.settings, self.out, self.devices = settings, settings.out_path, settings.devices or gpu_count() or 1
        self.budget = Budget(self.begun, settings.time_budget)
        self.log = EventLog(self.out, self.begun, silent)
        self.challenges = load_challenges(settings.tasks, settings.solutions).select(settings.ids, settings.limit)
        if not self.challenges.tasks:
            raise ArcKernelError(next(iter(self.challenges.broken.values())))
        self.encoder = GridEncoder.from_name(settings.grid_encoder)
        self._stored = Stored(self.out, self.challenges, self.encoder, self.log)
        self._lock = FileLock(self.out / ".lock", timeout=0)
        self._fresh = self._claim_folder()
        self._low = False  # a disk is nearly full, which was said
        self._untrained: set[str] = set()  # tasks that were not trained for want of time or disk, or since workers died of it
        self._trained: set[str] = set()  # tasks that have an adapter
        self._notes: set[str] = set()  # what workers noted: of the model that they share each notes the same
        self._read_stored()
        for task_id, error in self.challenges.broken.items():
            self.log.say("broken-task", task=task_id, error=error)
        for task_id, text in self.challenges.unscored.items():
            self.log.say("note", task=task_id, text=text)
        self._pool: Pool | None = None
        self._stage("read tasks", time.perf_counter() - self.begun)

    def adapt(self) -> None:
        """Fine-tune one LoRA per task that has neither an adapter nor answers yet, within its share of the time budget.

        Where the steps of all tasks do not fit, long ones have fewer.
        """
        if self._pool is not None:  # a notebook's cell is run again
            self.stop()
        take_folder(self._lock, self.out)
        self._read_stored()  # of another run that came to its end meanwhile
        unanswered = self._unanswered()
        if not unanswered:
            self._lock.release()
            return
        try:
            todo = self._start(unanswered)
        except BaseException as error:
            self._give_up(error)
            raise
        steps, tokens = len(todo["adapt"]) * self.job.ttt_steps, defaultdict(int)
        done, finished, cut = defaultdict(int), 0, []
        with progress.bar(steps, "adapt", "step") as bar:
            for message in self._events("adapt", self.job.adapt_until, self.budget.grace):
                task, event = message.get("task"), message["event"]
                if event == "out-of-time":
                    self._untrained.update(message["tasks"])
                    bar.total -= sum(self.job.ttt_steps - done[i] for i in message["tasks"])
                if event == "loss":
                    tokens[task], done[task] = message["tokens"], message["step"]
                elif event in ("adapted", "adapt-failed"):
                    if event == "adapted":
                        self._trained.add(task)
                    if message.get("again"):
                        self._untrained.add(task)
                    finished += 1
                    bar.total -= self.job.ttt_steps - done[task]
                    if message.get("steps", self.job.ttt_steps) < self.job.ttt_steps:
                        cut.append(message["steps"])
                elif message.get("held"):  # no step ends: the worker hangs
                    self._pool.stop_holders("adapt")
                progress.move(bar, sum(done.values()), sum(tokens.values()), f"{finished}/{len(todo['adapt'])} tasks", self._over)
        for task in todo["adapt"]:
            folder = Path(self.job.adapters) / task
            if kept := adapt.keep_longer(folder):
                self.log.say("note", task=task, text=f"task {task}: its adapter of an earlier start, of {kept} steps, is kept")
            if folder.is_dir():
                self._trained.add(task)
                self._untrained.discard(task)
        if cut:
            self.log.say("note", text=f"time budget: fewer steps for {len(cut)} of {len(todo['adapt'])} tasks: "
                                   f"{min(cut)} to {max(cut)} of {self.job.ttt_steps}")

    def answer(self) -> None:
        """Answer every task that has no completions yet; submission.json is replaced as answers arrive.

        Where the predictions of all tasks do not fit into the time budget, long ones have fewer.
        """
        if self._pool is None:
            return
        expected = {i: self.challenges.outputs[i] * self.job.views for i in self._unanswered()}
        done, tokens, written, given_up, cut, answered = defaultdict(int), 0, time.perf_counter(), False, [], set()
        with progress.bar(sum(expected.values()), "answer", "prediction") as bar:
            for message in self._events("answer", self.budget.last_call, self.budget.grace):
                if message["event"] == "out-of-time":
                    bar.total -= sum(expected[i] - done[i] for i in message["tasks"])
                elif message["event"] == "completion":
                    done[message["task"]] += 1
                    tokens += message["tokens"]
                elif message["event"] == "decided":
                    done[message["task"]] += message["predictions"]
                elif message["event"] == "answered":
                    done[message["task"]] = expected[message["task"]] - message["cut"]
                    bar.total -= message["cut"]
                    answered.add(message["task"])
                    self._check_adapter(message["task"])
                    if message["task"] in self._untrained:
                        self._stored.set_aside(message["task"])
                    self.candidates[message["task"]] = self._stored.candidates(message["task"])
                    if message["cut"] and not message.get("error"):
                        cut.append(message["cut"])
                    if time.perf_counter() - written > SUBMISSION_SECONDS:
                        self._write_submission()
                        written = time.perf_counter()
                given_up = given_up or bool(message.get("held"))
                progress.move(bar, sum(done.values()), tokens, f"{len(answered)}/{len(expected)} tasks", self._over)
        if cut:
            self.log.say("note", text=f"time budget: fewer predictions for {len(cut)} of {len(expected)} tasks: "
                                   f"{min(cut)} to {max(cut)} less than asked")
        unheard = expected.keys() - answered  # of workers that died or hang: what there is votes
        self.candidates |= {i: found for i in unheard if (found := self._stored.candidates(i)) is not None}
        self._write_submission()
        if given_up:
            self.stop()

    def finish(self) -> dict:
        """Close workers; write submission, metrics and report; what `solve` returns: paths, metrics, stage rows."""
        if self._pool is not None:
            for message in self._pool.close(self.budget.workers_until):
                self._note(message)
            self._pool = None
        begun, metrics = time.perf_counter(), None
        try:
            if self._lock.is_locked:
                self._write_submission()
                self._lock.release(force=True)
            else:
                self._read_stored()
            if metrics := score.score(self.challenges, self.attempts(), self.candidates):
                write_json(self.out / "metrics.json", metrics)
        except OSError as error:  # Kaggle takes no submission of a notebook that ends with an error
            if not disk.fault(error):
                raise
            self.log.say("note", text=f"{self.out}: the last votes are not written ({error.strerror}): free some disk and start again")
            self._lock.release(force=True)
        attempts = self.attempts()
        self._stage("vote, score", time.perf_counter() - begun)
        rows = stage_rows(self.events())
        try:
            path = report.write_report(self.out, self.settings, self.challenges, self.candidates, attempts, metrics, self.events())
        except Exception as error:  # as above
            if not disk.fault(error):
                traceback.print_exc()
            self.log.say("note", text=f"report.html is not written: {named_line(error)}")
            path = None
        return {"submission": self.out / "submission.json", "report": path, "metrics": metrics, "stages": rows,
                "seconds": round(time.perf_counter() - self.begun, 1), "free_gb": round(disk.free_gb(self.out), 1)}

    def _start(self, unanswered: list[str]) -> dict[str, list[str]]:
        """Check model and folders, and start the workers; the tasks they are given by stage."""
        begun = time.perf_counter()
        self._fresh = self._claim_folder() or self._fresh
        self.job = self._resolve()
        self._stage("check model", time.perf_counter() - begun)
        adapters = Path(self.job.adapters)
        for i in unanswered:  # of a start that was killed
            adapt.keep_longer(adapters / i)
        taken = {i: adapt.steps_taken(adapters / i) for i in unanswered}
        fewer = sorted((i for i in unanswered if taken[i] < self.settings.ttt_steps), key=lambda i: taken[i] > 0)
        todo = {"adapt": fewer, "answer": unanswered}
        for i in fewer:  # no engine is started on what is replaced meanwhile
            adapt.set_aside(adapters / i)
        if todo["adapt"]:
            disk.make(adapters, "scratch" if self.settings.scratch else "--out")
            if not self.settings.adapter:  # which may have modules of its own
                size = disk.adapter_bytes(Path(self.job.model), self.job.lora_rank, adapt.TARGET_MODULES)
                if not size:
                    raise adapt.nothing_to_adapt(self.job.model)
                self.log.say("disk", text=disk.forecast(len(todo["adapt"]), size, adapters))
        self._trained = {i for i in unanswered if (adapters / i).is_dir()}
        tasks = {i: task_to_json(self.challenges.tasks[i]) for i in todo["answer"]}
        self._pool = Pool(self.devices, dataclasses.asdict(self.job), tasks, todo, self.out, self._share)
        return todo

    def _give_up(self, error: BaseException) -> None:
        """Stop; where the settings are at fault and nothing was done with them, another start on this folder may have others."""
        self.stop()
        if self._fresh and isinstance(error, ArcKernelError):
            (self.out / "settings.json").unlink(missing_ok=True)

    def events(self) -> list[dict]:
        """Everything that happened on this output folder so far, one dict per line of events.jsonl."""
        return read_events(self.out)

    def attempts(self) -> dict[tuple[str, int], Attempts]:
        """The two attempts of every test output as they stand now."""
        return select.vote(self.challenges, self.candidates)

    def stop(self) -> None:
        """Kill the workers (after an interruption), and let others have the folder."""
        if self._pool is not None:
            self._pool.kill()
            self._pool = None
        self._lock.release(force=True)

    def _share(self, stage: str, task_id: str) -> float:
        """The share of the time left for a stage that a task given out now may take; tasks are of one size, or of their outputs' number
        where they are answered."""
        size = lambda i: 1 if stage == "adapt" else self.challenges.outputs[i]
        return share(size(task_id), sum(map(size, self._pool.todo[stage])), self._pool.workers)

    def _events(self, stage: str, deadline: float, grace: float):
        self._over: dict[str, None] = {}  # stages of workers that are over since this one began
        try:
            for message in self._pool.events(stage, deadline, grace):
                self._note(message)
                if message["event"] == "stage":
                    self._over[message["stage"]] = None
                yield message
        except BaseException as error:
            self._give_up(error)
            raise

    def _note(self, message: dict) -> None:
        """Write a worker's message to events.jsonl and do what it asks of the run."""
        event, facts = message["event"], {k: v for k, v in message.items() if k != "event"}
        if event == "completion" or event == "note" and facts["text"] in self._notes:
            return
        if event == "note":
            self._notes.add(facts["text"])
        if event == "worker-died":
            self._untrained.update(message["given_up"]["adapt"])
        if event == "verdict":
            Precision(*(message[f.name] for f in dataclasses.fields(Precision))).save(self.out / "precision.json")
            facts = {k: v for k, v in facts.items() if k not in ("peaks", "key")}
        loud = (event in ("note", "adapt-failed", "worker-died", "precision", "stop", "out-of-time")
                or (event == "verdict" and message["dtype"] is None))
        loud = loud or bool(facts.get("error"))
        (self.log.say if loud else self.log.add)(event, **facts)
        self._fresh = self._fresh and event not in ("adapted", "answered")
        if event in ("adapted", "answered") and not self._low:
            left, folder = min((disk.free_gb(folder), folder) for folder in (self.out, Path(self.job.adapters)))
            if left < disk.LOW_GB:
                self._low = True
                self.log.say("disk", text=f"{folder}: only {left:.1f} GB left: free some, or what comes next is lost")

    def _stage(self, stage: str, seconds: float) -> None:
        self.log.add("stage", stage=stage, seconds=round(seconds, 3))

    def _claim_folder(self) -> bool:
        """Make the output folder this run's: refuse one that cannot be written, or holds a run with other settings; whether it
        held none."""
        try:
            make_writable(self.out)
        except OSError as error:
            raise ArcKernelError(f"{self.out}: cannot be written ({error.strerror}): give another --out") from None
        path, mine = self.out / "settings.json", self._identity()
        if path.is_file():
            other, tasks = stored_settings(self.out)
            lines = self.settings.differences(other) + ["the tasks themselves"] * (tasks != mine["tasks_sha256"])
            if lines:
                raise ArcKernelError(f"{self.out}: holds a run with other settings ({'; '.join(lines)}): give another --out, or delete it")
            return False
        write_json(path, mine)
        return True

    def _claim_weights(self, model: Path) -> str:
        """The sha256 of model and adapter, kept in settings.json; refuse a folder where other weights answered under the same name."""
        path, start = self.out / "settings.json", self.settings.adapter
        mine = digest([checkpoint.weights_sha256(folder) for folder in (model, *[Path(start)] * bool(start))])
        stored = read_json(path)
        if stored.get("weights_sha256", mine) != mine:
            changed = " or ".join(filter(None, (self.settings.model, start)))
            raise ArcKernelError(f"{self.out}: holds a run with other weights, {changed} has changed: give another --out, or delete it")
        write_json(path, stored | {"weights_sha256": mine})
        return mine

    def _identity(self, resume: bool = False) -> dict:
        """Settings and the tasks' digest; with `resume` only the settings that must be the same when a run is continued."""
        names = [f.name for f in dataclasses.fields(self.settings) if f.metadata["resume"] or not resume]
        located = lambda value: str(Path(value).absolute()) if value and Path(value).exists() else value  # found from any folder
        files = {name: located(getattr(self.settings, name)) for name in ("tasks", "solutions") if name in names}
        return {name: getattr(self.settings, name) for name in names} | files | {"tasks_sha256": tasks_digest(self.challenges)}

    def _resolve(self) -> Job:
        """Settings with what can be told without loading the model made explicit; checks model and adapter."""
        s = self.settings
        model = checkpoint.open_model(s.model)
        for name, trained in trained_prompt.recorded(s.model, s.adapter).items():
            if trained != getattr(s, name):
                self.log.say("note", text=f"{name} is {getattr(s, name)}, but {s.adapter or s.model} was fine-tuned with {trained}")
        if s.adapter:
            adapter_fit.check_served(Path(s.adapter), model)
        if s.profile != "auto":
            profiles.load(s.profile)
        gpus = gpu_count()
        if gpus and s.devices > gpus:
            raise ArcKernelError(f"settings: devices is {s.devices}: this machine shows {gpus} GPU")
        if not (s.devices or gpus):
            self.devices = cpu_workers(len(self._unanswered()), s.ttt_steps, checkpoint.parameter_count(model))
            if self.devices > 1:
                self.log.say("note", text=f"{self.devices} workers share this machine's {len(cores())} cores (devices=1: one has them all)")
        identity = self._identity(resume=True) | {"weights_sha256": self._claim_weights(model)}
        adapters = disk.adapters_folder(self.out, s.scratch, identity)
        backend = generate.chosen_backend(s.backend)
        if backend != "vllm" and s.backend == "auto":
            self.log.say("note", text="vLLM is not installed here: answering with the transformers backend")
        shared = {f.name for f in dataclasses.fields(Job)} & {f.name for f in dataclasses.fields(Settings)}
        resolved = {
            "model": str(model.resolve()), "out": str(self.out.resolve()), "adapters": str(adapters.resolve()), "backend": backend,
            "permute_background": s.background == "permuted", "max_seq_len": min(s.max_seq_len, checkpoint.context_length(model)),
            "ttt_lr": s.ttt_lr or adapt.default_lr(checkpoint.full_parameter_count(model)),
            "adapt_until": self.budget.adapt_until, "answer_until": self.budget.answer_until,
            "probe_tasks": tuple(map(task_to_json, probe.sample(self.challenges.tasks.values())))}
        job = Job(**{name: getattr(s, name) for name in shared} | resolved)
        self.log.add("resolved", **{k: v for k, v in dataclasses.asdict(job).items() if k not in UNTOLD})
        return job

    def _unanswered(self) -> list[str]:
        """Task ids still to answer: longest first, so that workers end together; where time may run out, shortest first, so that most
        tasks are done."""
        order = sorted(self.challenges.tasks.values(), key=lambda t: (cells(t), t.id))
        if self.settings.self_test:
            order = order[: self.devices]
        if not self.settings.time_budget:
            order.sort(key=cells, reverse=True)
        return [t.id for t in order if not self._stored.whole(t.id).is_file()]

    def _read_stored(self) -> None:
        """Take what earlier starts on this folder answered, and write a submission of it; where another run is at work here, it does."""
        try:
            with self._lock:
                self.candidates = self._stored.all_candidates(mine=not self.log.silent)
                self._write_submission()
        except Timeout:
            self.candidates = self._stored.all_candidates(mine=False)

    def _check_adapter(self, task_id: str) -> None:
        """Count a task as not trained whose adapter is gone: it was answered without."""
        folder = Path(self.job.adapters) / task_id
        if task_id in self._trained and not folder.is_dir():
            self._untrained.add(task_id)
            self.log.say("note", task=task_id, text=f"{folder}: gone since the task was trained: a next start trains and answers it again")

    def _write_submission(self) -> None:
        write_submission(self.out / "submission.json", self.challenges.outputs, self.attempts())


def solve(settings: Settings) -> dict:
    """The whole job; returns what `Run.finish` returns. Raises ArcKernelError in one line."""
    run = None
    try:
        run = Run(settings)
        run.adapt()
        run.answer()
        return run.finish()
    except OSError as error:
        if not disk.fault(error):
            raise
        raise ArcKernelError(f"{error.filename or settings.out}: cannot be written ({error.strerror}): free some disk and start again: "
                             "it goes on from there") from None
    finally:
        if run is not None:
            run.stop()


def write_report_again(out: Path) -> Path:
    """Write the report.html of a run folder from its files; raises ArcKernelError where it holds no run."""
    settings = dataclasses.replace(stored_settings(out)[0], out=str(out))
    path = Run(settings, silent=True).finish()["report"]
    if path is None:
        raise ArcKernelError(f"{out / 'report.html'}: not written: see above")
    return path
