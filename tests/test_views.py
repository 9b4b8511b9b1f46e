"""Views undo themselves, and a run's views are distinct prompts: `python -m pytest tests/test_views.py`."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import grids, small_tasks, views

from arc_kernel.grids import GridEncoder
from arc_kernel.prompts import PromptBuilder
from arc_kernel.tasks import Pair, Task
from arc_kernel.views import SYMMETRIES, View, random_view, shared_views, spread_views, task_rng

SQUARE = np.array([[5]], np.int8)
CORNERS = np.array([[1, 2], [0, 1]], np.int8)
STRIPE = np.array([[0, 3, 0]], np.int8)


@pytest.fixture(scope="module")
def builder(tokenizer):
    return PromptBuilder(tokenizer, GridEncoder.from_name("digits"), "compact")


def task_of(*pairs, test):
    return Task("made", tuple(Pair(a, b) for a, b in pairs), (Pair(test, None),))


def spread(task, n, seed=0, permute_background=False, test_index=0):
    return spread_views(task, test_index, n, task_rng(seed, task.id, "views"), permute_background)


@given(view=views(), grid=grids())
def test_undo_brings_every_grid_back(view, grid):
    seen = view.apply_grid(grid)
    assert seen.dtype == np.int8 and seen.flags.c_contiguous
    assert np.array_equal(view.undo(seen), grid) and np.array_equal(view.apply_grid(view.undo(grid)), grid)


def test_the_eight_symmetries_are_eight_and_do_what_they_are_called():
    grid = np.arange(6, dtype=np.int8).reshape(2, 3)
    plain = [View(s, tuple(range(10)), ()).apply_grid(grid) for s in range(8)]
    assert len({(g.shape, g.tobytes()) for g in plain}) == 8
    assert plain[SYMMETRIES.index("identity")].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert plain[SYMMETRIES.index("rot90")].tolist() == [[2, 5], [1, 4], [0, 3]]
    assert plain[SYMMETRIES.index("flip")].tolist() == [[2, 1, 0], [5, 4, 3]]
    assert plain[SYMMETRIES.index("flip.rot90")].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_colours_are_what_the_view_says():
    swapped = View(0, (0, 2, 1, *range(3, 10)), ())
    assert swapped.apply_grid(CORNERS).tolist() == [[2, 1], [0, 2]]


@given(task=small_tasks(), data=st.data())
def test_a_view_turns_every_grid_of_a_task_and_orders_its_pairs(task, data):
    view = data.draw(views(len(task.train)))
    seen = view.apply(task)
    assert seen.id == task.id and len(seen.test) == 1
    for place, i in enumerate(view.order):
        assert np.array_equal(view.undo(seen.train[place].input), task.train[i].input)
        assert np.array_equal(view.undo(seen.train[place].output), task.train[i].output)
    assert np.array_equal(view.undo(seen.test[0].output), task.test[0].output)


def test_an_unknown_test_output_stays_unknown_under_a_view():
    assert View(3, tuple(range(10)), ()).apply(task_of(test=CORNERS)).test[0].output is None


def test_a_view_for_another_number_of_pairs_is_refused():
    for order in ((0, 1), ()):
        with pytest.raises(ValueError, match=f"{len(order)} train pairs on task made with 1"):
            View(0, tuple(range(10)), order).apply(task_of((CORNERS, CORNERS), test=CORNERS))


@given(view=st.integers(0, 12).flatmap(views))
def test_a_view_reads_back_from_its_print(view):
    assert View.parse(str(view)) == view


@pytest.mark.parametrize("text", [
    "", "identity", "identity|0123456789", "turn|0123456789|0", "identity|0123456788|0", "identity|012345678|0",
    "identity|0123456789|1", "identity|0123456789|0,0", "identity|0123456789|0, 1", "identity|0123456789|00", "identity|0123456789|a",
    "identity|\u06601234567\u06689|0", "identity|0123456789|0|",
])
def test_what_no_view_prints_as_is_no_view(text):
    with pytest.raises(ValueError):
        View.parse(text)


def test_a_random_view_keeps_colour_0_unless_told_otherwise():
    drawn = lambda background: [random_view(3, np.random.default_rng(i), background) for i in range(50)]
    assert {v.colours[0] for v in drawn(False)} == {0}
    assert len({v.colours[0] for v in drawn(True)}) > 5
    assert {v.symmetry for v in drawn(False)} == set(range(8))
    assert all(sorted(v.colours) == list(range(10)) and sorted(v.order) == [0, 1, 2] for v in drawn(True))


def test_random_view_has_every_order_of_the_train_pairs():
    assert {random_view(3, np.random.default_rng(i)).order for i in range(60)} == set(itertools.permutations(range(3)))


@pytest.mark.parametrize("permute_background", [False, True])
def test_views_of_real_tasks_are_distinct_prompts_and_the_first_is_the_task_as_it_is(arc_training, builder, permute_background):
    for task in itertools.islice(arc_training.tasks.values(), 0, 400, 13):
        for i in range(len(task.test)):
            found = spread(task, 12, permute_background=permute_background, test_index=i)
            assert len({tuple(builder.prompt(v, task, i)) for v in found}) == len(found) == 12
            assert found[0] == View(0, tuple(range(10)), tuple(range(len(task.train))))


@pytest.mark.parametrize("n", [1, 2, 8, 9, 21, 40])
def test_views_are_spread_evenly_over_the_symmetries(arc_training, n):
    for task_id in ("007bbfb7", "0520fde7", "d037b0a7"):
        found = spread(arc_training.tasks[task_id], n)
        counts = Counter(v.symmetry for v in found)
        assert len(found) == n and len(counts) == min(n, 8)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_first_symmetry_after_the_task_as_it_is_may_be_any(arc_training):
    assert {spread(arc_training.tasks["007bbfb7"], 2, seed)[1].symmetry for seed in range(40)} == set(range(1, 8))


SCARCE = {
    "one colour and one cell": (task_of((SQUARE, SQUARE), test=SQUARE), False),
    "one colour, background permuted": (task_of((SQUARE, SQUARE), test=SQUARE), True),
    "nothing but background": (task_of((SQUARE * 0, SQUARE * 0), test=SQUARE * 0), False),
    "no pairs": (task_of(test=STRIPE), False),
    "two colours without symmetry": (task_of((CORNERS, CORNERS), test=CORNERS), False),
    "symmetric grids": (task_of((STRIPE, STRIPE), test=STRIPE), False),
    "two pairs in two orders": (task_of((STRIPE, SQUARE * 0), (SQUARE * 0, STRIPE), test=STRIPE), False),
    "the same pair twice": (task_of((STRIPE, STRIPE), (STRIPE, STRIPE), test=STRIPE), False),
    "pairs that are each other's mirror": (task_of((STRIPE, STRIPE.T), (STRIPE.T, STRIPE), test=SQUARE * 0), False),
}


@pytest.mark.parametrize("task, permute_background", SCARCE.values(), ids=SCARCE)
def test_where_few_prompts_exist_each_is_found_exactly_once(builder, task, permute_background):
    existing = {tuple(builder.prompt(v, task, 0)) for v in every_view(task, permute_background)}
    found = [tuple(builder.prompt(v, task, 0)) for v in spread(task, 3000, permute_background=permute_background)]
    assert len(found) == len(set(found)) and set(found) == existing


def every_view(task, permute_background):
    """One view for each symmetry, order of pairs and way to recolour the colours that occur."""
    occurring = {int(c) for p in (*task.train, *task.test) for g in (p.input, p.output) if g is not None for c in g.flat}
    free = sorted(occurring if permute_background else occurring - {0})
    allowed = range(0 if permute_background else 1, 10)
    for images in itertools.permutations(allowed, len(free)):
        left = iter(c for c in allowed if c not in images)
        chosen = dict(zip(free, images)) | ({} if permute_background else {0: 0})
        colours = tuple(chosen[c] if c in chosen else next(left) for c in range(10))
        for symmetry, order in itertools.product(range(8), itertools.permutations(range(len(task.train)))):
            yield View(symmetry, colours, order)


def test_many_equal_pairs_give_no_views_of_their_own_and_no_endless_search():
    black = SQUARE * 0
    assert len(spread(task_of(*[(black, black)] * 10, test=black), 8)) == 1
    assert len(spread(task_of(*[(SQUARE, SQUARE)] * 10, test=SQUARE), 16)) == 9
    assert len(spread(task_of(*[(black, black)] * 9, (SQUARE, SQUARE), test=black), 200)) == 90


@given(task=small_tasks(side=2, colours=3), n=st.integers(1, 60), background=st.booleans())
def test_fewer_views_than_asked_are_given_only_where_no_more_exist(builder, task, n, background):
    found = spread(task, n, permute_background=background)
    more = spread(task, n + 1, permute_background=background)
    assert len(found) <= n
    assert len(found) == n or len(more) == len(found)
    assert len({tuple(builder.prompt(v, task, 0)) for v in found}) == len(found)


def test_test_inputs_share_views_that_are_distinct_for_each(arc_training, builder):
    several = [t for t in arc_training.tasks.values() if len(t.test) > 1]
    for task in several[::4]:
        tests = range(len(task.test))
        found = shared_views(task, tests, 16, 0)
        assert all(found[i] == found[0] for i in tests)
        for i in tests:
            assert len({tuple(builder.prompt(v, task, i)) for v in found[i]}) == 16
    black = SQUARE * 0
    uneven = Task("made", (Pair(black, black),), (Pair(CORNERS, None), Pair(black, None)))
    assert {i: len(found) for i, found in shared_views(uneven, (0, 1), 2, 0).items()} == {0: 2, 1: 1}


@given(task=small_tasks(side=2, colours=3), other=grids(2, 3), n=st.integers(1, 60), background=st.booleans())
def test_test_input_with_fewer_prompts_than_the_others_gets_each_of_its_own(task, other, n, background):
    both = Task(task.id, task.train, (*task.test, Pair(other, None)))
    found = shared_views(both, (0, 1), n, 0, background)
    for i in (0, 1):
        assert len(found[i]) == len(spread(both, n, test_index=i, permute_background=background))
        assert found[i][0] == View(0, tuple(range(10)), tuple(range(len(task.train))))


@given(task=small_tasks())
def test_spread_views_keep_colour_0_unless_told_otherwise(task):
    assert {v.colours[0] for v in spread(task, 20)} == {0}
    assume(any((g == 0).any() for p in task.train for g in (p.input, p.output)))
    assert len({v.colours[0] for v in spread(task, 20, permute_background=True)}) > 1


def test_views_depend_on_the_seed_and_the_task_and_on_nothing_global(arc_training):
    task = arc_training.tasks["007bbfb7"]
    first = spread(task, 8, seed=3)
    np.random.seed(1)
    assert spread(task, 8, seed=3) == first
    assert spread(task, 8, seed=4) != first
    state = np.random.get_state()[1].copy()
    spread(task, 8, seed=3)
    assert np.array_equal(np.random.get_state()[1], state)


def test_purposes_and_tasks_have_randomness_of_their_own():
    draws = [task_rng(*key).integers(1 << 62) for key in ((0, "a", "x"), (0, "a", "y"), (0, "b", "x"), (1, "a", "x"), (0, "a", "x"))]
    assert len(set(draws)) == 4 and draws[0] == draws[4]
