"""What is printed never acts on the terminal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnnpipe.errors import printable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat, été 🐱", "a cat, été 🐱"), ("a\nb\r", r"a\nb\r"), ("\x1b[2J", r"\x1b[2J"),
        ("\u202egpj", r"\u202egpj"), ("caf\udce9", r"caf\xe9"), ("\x85", r"\x85"), ("", ""),
    ],
)  # fmt: skip
def test_what_a_terminal_would_act_on_is_escaped_and_all_else_stays(
    text: str, expected: str
) -> None:
    assert printable(text) == expected


@given(st.text(st.characters()))
def test_any_text_becomes_printable(text: str) -> None:
    assert printable(text).isprintable()
    assert printable(text).encode().decode() == printable(text)
