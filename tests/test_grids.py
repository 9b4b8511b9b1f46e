"""Every encoder is an exact round trip and reads nothing else: `python -m pytest tests/test_grids.py`."""

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from strategies import grids

from arc_kernel.errors import ArcKernelError
from arc_kernel.grids import ENCODERS, GridEncoder, Unparsable

TINY, WIDE = np.array([[7]], np.int8), np.arange(900, dtype=np.int8).reshape(30, 30) % 10
ALPHABET = "0123456789 x\n`grid"
encoders = st.sampled_from(ENCODERS).map(GridEncoder.from_name)


def text_of(name, rows):
    return GridEncoder.from_name(name).encode(np.array(rows, np.int8))


def test_sixteen_names_are_known():
    assert len(ENCODERS) == len({text_of(name, [[1, 2], [3, 4]]) for name in ENCODERS}) == 16


def test_the_texts_are_what_the_names_say():
    grid = [[1, 2, 3], [4, 5, 6]]
    assert text_of("digits", grid) == "123\n456"
    assert text_of("spaced", grid) == "1 2 3\n4 5 6"
    assert text_of("rows+digits", grid) == "1 123\n2 456"
    assert text_of("shape+digits", grid) == "2x3\n123\n456"
    assert text_of("fenced+shape+rows+spaced", grid) == "```grid\n2x3\n1 1 2 3\n2 4 5 6\n```"


@pytest.mark.parametrize("name", ENCODERS)
@given(grid=grids())
@example(grid=TINY)
@example(grid=WIDE)
def test_every_grid_comes_back_from_its_text(name, grid):
    encoder = GridEncoder.from_name(name)
    decoded = encoder.decode(encoder.encode(grid))
    assert decoded.dtype == np.int8 and np.array_equal(decoded, grid)


@pytest.mark.parametrize("name", ENCODERS)
@given(grid=grids())
def test_pieces_joined_are_the_text_and_cells_stand_alone(name, grid):
    encoder = GridEncoder.from_name(name)
    lines = encoder.lines(grid)
    assert "\n".join("".join(pieces) for pieces in lines) == encoder.encode(grid)
    first_row = lines[encoder.fenced + encoder.shape]
    assert [p for p in first_row[encoder.rows:] if p != " "] == [str(c) for c in grid[0]]


@pytest.mark.parametrize("name", ENCODERS)
@given(grid=grids())
def test_no_encoding_is_longer_than_that_of_the_longest_grid(name, grid):
    encoder = GridEncoder.from_name(name)
    assert len(encoder.encode(grid)) <= len(encoder.encode(encoder.longest()))


@pytest.mark.parametrize("name", ["", "digit", "rows", "shape+rows", "rows+shape+digits", "shape+shape+digits", "digits+spaced",
                                  "digits+rows", "Digits", " digits", "shape++digits", "__import__('os')"])
def test_an_unknown_name_is_one_line_that_lists_the_parts(name):
    with pytest.raises(ArcKernelError) as raised:
        GridEncoder.from_name(name)
    message = str(raised.value)
    assert repr(name) in message and "digits or spaced" in message and "\n" not in message


BROKEN = {
    "wrong height": ("shape+digits", "3x2\n12\n34"),
    "wrong width": ("shape+digits", "2x3\n12\n34"),
    "shape with a leading zero": ("shape+digits", "02x2\n12\n34"),
    "shape of 31": ("shape+digits", "31x2\n12\n34"),
    "shape of 0": ("shape+digits", "0x2\n"),
    "no shape": ("shape+digits", "12\n34"),
    "shape and nothing": ("shape+digits", "2x2"),
    "row more than the shape says": ("shape+digits", "2x2\n12\n34\n56"),
    "wrong row number": ("rows+digits", "1 12\n3 34"),
    "row numbers from 0": ("rows+digits", "0 12\n1 34"),
    "no row number": ("rows+digits", "12\n34"),
    "two spaces after the row number": ("rows+digits", "1  12\n2 34"),
    "row number and nothing": ("rows+digits", "1 "),
    "ragged rows": ("digits", "12\n345"),
    "a short row": ("digits", "12\n3"),
    "empty text": ("digits", ""),
    "an empty row": ("digits", "12\n\n34"),
    "a trailing newline": ("digits", "12\n34\n"),
    "a trailing space": ("digits", "12\n34 "),
    "a carriage return": ("digits", "12\r\n34"),
    "text after": ("digits", "12\n34\nThat is the answer."),
    "text before": ("digits", "Answer:\n12\n34"),
    "a letter": ("digits", "1a\n34"),
    "a digit of another script": ("digits", "1\u0663\n34"),
    "a minus": ("digits", "-1\n34"),
    "spaces where none belong": ("digits", "1 2\n3 4"),
    "no spaces where they belong": ("spaced", "12\n34"),
    "a double space": ("spaced", "1  2\n3 4"),
    "a space at the end of a row": ("spaced", "1 2 \n3 4"),
    "a cell of two digits": ("spaced", "10 2\n3 4"),
    "31 rows": ("digits", "\n".join(["1"] * 31)),
    "31 columns": ("digits", "1" * 31),
    "31 columns, spaced": ("spaced", " ".join("1" * 31)),
    "31 numbered rows": ("rows+digits", "\n".join(f"{i} 1" for i in range(1, 32))),
    "no fence": ("fenced+digits", "12\n34"),
    "no opening fence": ("fenced+digits", "12\n34\n```"),
    "no closing fence": ("fenced+digits", "```grid\n12\n34"),
    "half a closing fence": ("fenced+digits", "```grid\n12\n34\n``"),
    "a fence of another kind": ("fenced+digits", "```\n12\n34\n```"),
    "text after the fence": ("fenced+digits", "```grid\n12\n34\n```\nDone."),
    "a newline after the fence": ("fenced+digits", "```grid\n12\n34\n```\n"),
    "a fence around nothing": ("fenced+digits", "```grid\n```"),
    "31 fenced rows": ("fenced+digits", "\n".join(["```grid", *"1" * 31, "```"])),
}


@pytest.mark.parametrize("name, text", BROKEN.values(), ids=BROKEN)
def test_what_is_not_exactly_an_encoding_is_unparsable(name, text):
    with pytest.raises(Unparsable):
        GridEncoder.from_name(name).decode(text)


@given(encoder=encoders, grid=grids(side=5), data=st.data())
@settings(max_examples=300)
def test_a_changed_character_is_unparsable_or_another_grid_with_exactly_that_text(encoder, grid, data):
    text = changed(encoder.encode(grid), data)
    try:
        decoded = encoder.decode(text)
    except Unparsable:
        return
    assert encoder.encode(decoded) == text and not np.array_equal(decoded, grid)


@pytest.mark.parametrize("name", ENCODERS)
@given(grid=grids())
@example(grid=TINY)
@example(grid=WIDE)
@settings(max_examples=5)
def test_every_beginning_of_an_encoding_may_begin(name, grid):
    encoder = GridEncoder.from_name(name)
    text = encoder.encode(grid)
    assert [end for end in range(len(text) + 1) if not encoder.may_begin(text[:end])] == []


@given(encoder=encoders, grid=grids(side=3) | st.just(WIDE[:, :2]) | st.just(WIDE[:2]), data=st.data())
@settings(max_examples=500)
def test_what_may_begin_is_an_encoding_or_can_be_continued(encoder, grid, data):
    """As encodings are bounded in length, this makes may_begin exact: whatever it allows ends in some grid."""
    text = data.draw(st.just(encoder.encode(grid)) | st.just(changed(encoder.encode(grid), data)))
    ends = [i for i in range(len(text) + 1) if text[i:i + 1] in ("", "\n")]
    text = text[:data.draw(st.sampled_from(ends) | st.integers(0, len(text)))] + data.draw(st.text(ALPHABET, max_size=2))
    assume(encoder.may_begin(text))
    try:
        encoder.decode(text)
    except Unparsable:
        assert any(encoder.may_begin(text + character) for character in ALPHABET)


HOPELESS = {
    "shape out of bounds": ("shape+digits", "31"),
    "broken shape": ("shape+digits", "2x2x"),
    "wrong first row number": ("rows+digits", "2"),
    "wrong second row number": ("rows+digits", "1 12\n3"),
    "row longer than the first": ("digits", "12\n345"),
    "row shorter than the first": ("digits", "12\n3\n"),
    "row longer than the shape": ("shape+digits", "2x2\n123"),
    "row shorter than the shape": ("shape+digits", "2x2\n1\n"),
    "newline after the last row": ("shape+digits", "2x2\n12\n34\n"),
    "fence before the last row": ("fenced+shape+digits", "```grid\n2x2\n12\n`"),
    "row where the fence must be": ("fenced+shape+digits", "```grid\n1x2\n12\n3"),
    "space after the last cell": ("spaced", "1 2\n3 4 "),
    "space after the last cell of the shape": ("shape+spaced", "1x2\n1 2 "),
    "space after 30 cells": ("spaced", " ".join("1" * 30) + " "),
    "31 rows": ("digits", "1\n" * 30),
    "words": ("shape+rows+digits", "T"),
    "newline first": ("digits", "\n"),
    "anything after the fence": ("fenced+digits", "```grid\n1\n```\n"),
}


@pytest.mark.parametrize("name, text", HOPELESS.values(), ids=HOPELESS)
def test_what_no_encoding_starts_with_may_not_begin(name, text):
    encoder = GridEncoder.from_name(name)
    assert encoder.may_begin(text[:-1])
    assert not encoder.may_begin(text)


def changed(text, data):
    at = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.sampled_from(ALPHABET).filter(lambda c: c != text[at]))
    return text[:at] + other + text[at + 1:]
