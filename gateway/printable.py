"""Text of others on its way to a terminal or a log: what is no printable character is written as Python writes it.

A name, a description or what another server said may hold escapes that would clear a screen or forge a line.
"""

import logging
from typing import Any


def printable(text: str) -> str:
    """One line, whatever the text is."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def printable_lines(text: str) -> str:
    """The lines that a text has, and nothing else in them."""
    return "\n".join(map(printable, text.split("\n")))


def printable_json(text: str) -> str:
    """The same JSON: what it does not escape by itself stands in strings alone."""
    return "".join(one if one.isprintable() or one == "\n" else _in_json(one) for one in text)


class PrintableFormatter(logging.Formatter):
    """A message is one line; a traceback has its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return printable_lines(super().formatException(ei))


def _in_json(one: str) -> str:
    units = one.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[place : place + 4]}" for place in range(0, len(units), 4))
