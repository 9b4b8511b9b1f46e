"""The commands that README and docs/small-models.md tell a person to type exist, options and all:
`python -m pytest tests/test_lab_pages.py`."""

import re
import shlex
from pathlib import Path

import pytest

from arc_kernel.__main__ import _parser

PAGES = [Path(__file__).parent.parent / name for name in ("README.md", "docs/small-models.md")]
COMMAND = re.compile(r"(?:\$P|(?:\.venv/bin/python|torchrun \S+ \S+) -m arc_kernel) (\w.*?)\s*(?:#.*|; done)?$", re.M)


def commands(page):
    return COMMAND.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page,command", [(page.name, command) for page in PAGES for command in commands(page)])
def test_command_on_a_page_is_one_the_parser_takes(page, command):
    numbers = command.replace("$steps", "80")
    assert callable(_parser().parse_args(shlex.split(numbers)).command)


def parsers():
    (commands,) = (action for action in _parser()._actions if hasattr(action, "choices") and isinstance(action.choices, dict))
    return commands.choices


@pytest.mark.parametrize("name", parsers())
def test_help_says_each_default_that_says_something(name):
    parser = parsers()[name]
    text = " ".join(parser.format_help().split())
    assert not re.search(r"\(default: (None|\[\])?\)", text)
    for action in parser._actions:
        assert action.help, action.dest
        if action.option_strings and action.dest != "help" and action.default not in (None, "", []):
            assert f"(default: {action.default})" in text, action.dest


def test_pages_have_commands_and_a_wrong_one_is_seen():
    assert all(len(commands(page)) > 9 for page in PAGES)
    with pytest.raises(SystemExit):
        _parser().parse_args(["solve", "--no-such-option"])
