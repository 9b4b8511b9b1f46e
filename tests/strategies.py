"""What hypothesis draws in several test files: grids, small tasks, views; used by `python -m pytest tests`."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from arc_kernel.tasks import Pair, Task
from arc_kernel.views import View


def grids(side=30, colours=10):
    return hnp.arrays(np.int8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=side), elements=st.integers(0, colours - 1))


def small_tasks(max_pairs=3, side=4, colours=10):
    pairs = st.builds(Pair, grids(side, colours), grids(side, colours))
    return st.builds(lambda train, test: Task("drawn", tuple(train), (test,)), st.lists(pairs, max_size=max_pairs), pairs)


def views(pairs=0):
    return st.builds(View, st.integers(0, 7), st.permutations(range(10)).map(tuple), st.permutations(range(pairs)).map(tuple))
