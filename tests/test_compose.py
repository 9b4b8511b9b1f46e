"""Compositions change one side of every pair alike, fit into 30x30, and are never nothing: `python -m pytest tests/test_compose.py`."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import grids

from arc_kernel import compose
from arc_kernel.tasks import MAX_SIDE, Pair
from arc_kernel.views import SYMMETRIES, View

pairs_of_any_size = st.lists(st.builds(Pair, grids(), grids()), min_size=2, max_size=5)


@given(pairs=pairs_of_any_size, seed=st.integers(0, 1000))
def test_one_side_of_all_pairs_is_transformed_by_what_it_says_and_the_other_is_left(pairs, seed):
    made, drawn = compose.compose(pairs, np.random.default_rng(seed))
    if drawn is None:
        assert made == tuple(pairs)
        return
    other = {"input": "output", "output": "input"}[drawn.side]
    changed = [getattr(p, drawn.side) for p in made]
    assert all(np.array_equal(getattr(new, other), getattr(old, other)) for new, old in zip(made, pairs))
    assert all(np.array_equal(new, drawn.apply_grid(getattr(old, drawn.side))) for new, old in zip(changed, pairs))
    assert all(max(g.shape) <= MAX_SIDE and g.min() >= 0 and g.max() <= 9 for g in changed)
    assert any(not np.array_equal(new, getattr(old, drawn.side)) for new, old in zip(changed, pairs))


def test_a_grid_that_cannot_grow_is_never_left_as_it_is():
    large = np.arange(900, dtype=np.int8).reshape(30, 30) % 10
    for seed in range(50):
        _, drawn = compose.compose([Pair(large, large)] * 3, np.random.default_rng(seed))
        assert drawn.kind == "symmetry"


def test_each_kind_is_drawn_and_does_what_its_name_says():
    grid, seen = np.array([[1, 2], [3, 4]], np.int8), {}
    for seed in range(200):
        _, drawn = compose.compose([Pair(grid, grid)] * 2, np.random.default_rng(seed), ["output"])
        seen[str(drawn)] = drawn
    assert {d.kind for d in seen.values()} == set(compose.KINDS) and {d.side for d in seen.values()} == {"output"}
    assert seen["output mirror both"].apply_grid(grid).tolist() == [[1, 2, 2, 1], [3, 4, 4, 3], [3, 4, 4, 3], [1, 2, 2, 1]]
    assert seen["output upscale 1x2"].apply_grid(grid).tolist() == [[1, 1, 2, 2], [3, 3, 4, 4]]
    assert seen["output symmetry rot180"].apply_grid(grid).tolist() == [[4, 3], [2, 1]]
    assert compose.Composition("output", "padding", (1, 7)).apply_grid(grid).tolist() == [[7] * 4, [7, 1, 2, 7], [7, 3, 4, 7], [7] * 4]


def test_mirrors_are_where_their_names_say_and_symmetries_are_those_of_views():
    grid = np.array([[1, 2], [3, 4]], np.int8)
    right, down = (compose.Composition("output", "mirror", (compose.MIRRORS.index(name),)) for name in ("right", "down"))
    assert right.apply_grid(grid).tolist() == [[1, 2, 2, 1], [3, 4, 4, 3]]
    assert down.apply_grid(grid).tolist() == [[1, 2], [3, 4], [3, 4], [1, 2]]
    wide = np.arange(6, dtype=np.int8).reshape(2, 3)
    for number in range(len(SYMMETRIES)):
        turned = compose.Composition("input", "symmetry", (number,)).apply_grid(wide)
        assert np.array_equal(turned, View(number, tuple(range(10)), ()).apply_grid(wide))


def test_where_nothing_can_change_it_says_so():
    same = np.zeros((30, 30), np.int8)
    assert compose.compose([Pair(same, same)] * 2, np.random.default_rng(0))[1] is None


def test_every_composition_there_is_may_be_drawn_and_none_that_changes_nothing():
    rng = np.random.default_rng(0)
    drawn = {str(compose.draw(rng, ["input"])) for _ in range(3000)}
    wanted = {"symmetry": SYMMETRIES[1:], "mirror": ["right", "down", "both"],
              "padding": [f"{thick} of colour {colour}" for thick in (1, 2, 3) for colour in range(10)],
              "upscale": [f"{down}x{right}" for down in (1, 2, 3) for right in (1, 2, 3) if (down, right) != (1, 1)]}
    assert drawn == {f"input {kind} {numbers}" for kind, of in wanted.items() for numbers in of}
    symmetric, other = np.array([[1]], np.int8), np.array([[1, 2]], np.int8)
    turned = compose.Composition("input", "symmetry", (2,)).apply([Pair(symmetric, other), Pair(other, other)])
    assert turned[1].input.tolist() == [[2, 1]], "one pair that changes is enough"


@pytest.mark.parametrize("side", compose.SIDES)
def test_sides_can_be_chosen(side):
    grid = np.array([[1, 2, 3]], np.int8)
    assert {compose.compose([Pair(grid, grid)], np.random.default_rng(i), [side])[1].side for i in range(20)} == {side}


def test_both_sides_are_drawn_alike():
    sides = [compose.draw(np.random.default_rng(i)).side for i in range(60)]
    assert 15 < sides.count("input") < 45
