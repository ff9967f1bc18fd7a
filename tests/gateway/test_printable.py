"""Text of others in terminals and logs: nothing but printable characters, and no line that is not the program's own."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from loraplex.gateway.printable import PrintableFormatter, printable, printable_json, printable_lines


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("żółw 🐢 [red]", "żółw 🐢 [red]"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\r\n\tb", r"a\r\n\tb"),
        ("\x9b2J\u202e\U000e0001\ud800", r"\x9b2J\u202e\U000e0001\ud800"),
    ],
    ids=["printable", "escape", "lines", "beyond-ascii"],
)
def test_text_is_one_line_of_printable_characters(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable_lines(f"{text.replace(chr(10), '')}\nb").count("\n") == 1


def test_json_stays_what_it_is() -> None:
    told = {"name": "\x1b\x7f\x9b\u202e\U000e0001\ud800 ż🐢\n"}
    shown = printable_json(json.dumps(told, indent=2, ensure_ascii=False))
    assert json.loads(shown) == told
    assert "ż🐢" in shown
    assert all(line.isprintable() for line in shown.split("\n"))


def test_log_has_a_line_for_a_message_and_its_own_for_a_traceback() -> None:
    try:
        raise ValueError("\x1b[2J")
    except ValueError:
        record = logging.LogRecord(
            "n", logging.ERROR, "f", 1, "adapter %s failed: %s", ("a", "\x1b\nx"), sys.exc_info()
        )
    first, *others = PrintableFormatter("%(levelname)s %(message)s").format(record).split("\n")
    assert first == r"ERROR adapter a failed: \x1b\nx"
    assert (others[0], others[-1]) == ("Traceback (most recent call last):", r"ValueError: \x1b[2J")
