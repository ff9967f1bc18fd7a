"""The pieces that an answer's text is taken apart into, in the order they are said."""

from typing import TypeAlias

from msgspec import Struct


class Text(Struct, frozen=True):
    text: str


class Reasoning(Struct, frozen=True):
    text: str


class CallBegun(Struct, frozen=True):
    """A tool is called; its arguments follow in pieces, and end where another delta than theirs comes."""

    id: str
    name: str


class CallArguments(Struct, frozen=True):
    """A piece of JSON text, as the model wrote it."""

    text: str


Delta: TypeAlias = Text | Reasoning | CallBegun | CallArguments
