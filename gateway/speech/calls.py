"""An answer's text -> text and tool calls, told while they come.

However the text is cut into pieces, the same deltas come out, joined; and nothing is lost: what turns out to be no
call of a tool that was offered is text. White space around calls alone is dropped, and what only closes a call.
"""

import json
from collections.abc import Callable, Set
from typing import Any

from loraplex.gateway.speech.deltas import CallArguments, CallBegun, Delta, Text
from loraplex.gateway.speech.formats import CallFormat
from loraplex.gateway.speech.json_span import JsonSpan


class CallParser:
    """`feed` each piece, then `finish` once. `names` are the tools that may be called.

    Where a call `is_forced` the answer has no text: what would be a call, had it not been cut short, is not told.
    """

    def __init__(self, form: CallFormat, names: Set[str], *, is_forced: bool = False) -> None:
        self._form = form
        self._names = names
        self._is_forced = is_forced
        self._held = ""
        self._space = ""  # before a possible call
        self._is_beginning = True
        self._is_after_call = False
        self._closings: list[str] = []
        self._is_object = False
        self._span = JsonSpan()
        self._scanned = 0
        self._deltas: list[Delta] = []
        self._step: Callable[[], bool] = self._read_text

    def feed(self, text: str) -> list[Delta]:
        self._held += text
        while self._step():
            pass
        return self._take()

    def finish(self) -> list[Delta]:
        """The rest, once no text follows."""
        if self._step in (self._read_head, self._read_whole):
            self._say(self._space + self._held)
        elif self._step == self._read_text:
            self._say(self._held.lstrip() if self._is_after_call else self._held)
        self._held = ""
        return self._take()

    def _take(self) -> list[Delta]:
        taken, self._deltas = self._deltas, []
        return taken

    def _say(self, text: str) -> None:
        if text and not self._is_forced:
            self._deltas.append(Text(text))

    # Each of these takes what is certain off the held text, and tells whether another step may go on with the rest.

    def _read_text(self) -> bool:
        if self._is_beginning or self._is_after_call:
            stripped = self._held.lstrip()
            openings = self._form.opens_next if self._is_after_call else self._form.opens_answer
            if any(stripped.startswith(opening) for opening in openings):
                return self._expect_call(len(self._held) - len(stripped))
            if not stripped or any(opening.startswith(stripped) for opening in self._form.openings):
                return False
            if self._is_after_call:
                self._held = stripped
            self._is_beginning = self._is_after_call = False
        found = [place for opening in self._form.openings if (place := self._held.find(opening)) >= 0]
        certain = min(found) if found else len(self._held) - self._overlap()
        told = self._held[:certain].rstrip()
        self._say(told)
        self._held = self._held[len(told) :]
        return self._expect_call(certain - len(told)) if found else False

    def _overlap(self) -> int:
        """Length of the longest end of the held text that may be the beginning of an opening."""
        longest = 0
        for opening in self._form.openings:
            if opening[0] not in self._held:  # the common case, and cheap
                continue
            for length in range(min(len(self._held), len(opening) - 1), longest, -1):
                if self._held.endswith(opening[:length]):
                    longest = length
                    break
        return longest

    def _expect_call(self, num_spaces: int) -> bool:
        self._space, self._held = self._held[:num_spaces], self._held[num_spaces:]
        self._step = self._read_head
        return True

    def _read_head(self) -> bool:
        match = self._form.head.match(self._held, partial=True)
        if match is None:
            self._step, self._span, self._scanned = self._read_whole, JsonSpan(), 0
            return True
        if match.partial:
            return False
        name = match["name"]
        if name not in self._names:
            return self._refuse()
        self._begin(name)
        self._held = self._held[match.end() :]
        self._is_object = match.groupdict().get("object") is not None
        self._step, self._span = self._read_arguments, JsonSpan()
        return True

    def _read_arguments(self) -> bool:
        end = self._span.end(self._held, 0)
        told = self._held if end is None else self._held[:end]
        if told:
            self._deltas.append(CallArguments(told))
        self._held = self._held[len(told) :]
        if end is None:
            return False
        self._step = self._read_brace if self._is_object else self._read_closings
        self._closings = list(self._form.closings)
        return True

    def _read_brace(self) -> bool:
        """The end of a call's object; other fields in it say nothing to a client."""
        self._held = self._held.lstrip()
        if not self._held:
            return False
        if self._held[0] == "}":
            self._held = self._held[1:]
        elif self._held[0] == ",":
            self._step, self._span = self._skip_fields, JsonSpan()
            self._span.end("{", 0)
            return True
        self._step = self._read_closings
        return True

    def _skip_fields(self) -> bool:
        end = self._span.end(self._held, 0)
        self._held = "" if end is None else self._held[end:]
        if end is None:
            return False
        self._step = self._read_closings
        return True

    def _read_closings(self) -> bool:
        while self._closings:
            self._held = self._held.lstrip()
            closing = self._closings[0]
            if self._held.startswith(closing):
                self._held = self._held[len(closing) :]
            elif closing.startswith(self._held):
                return False
            del self._closings[0]
        self._is_after_call = True
        self._step = self._read_text
        return True

    def _read_whole(self) -> bool:
        """A call whose fields come in another order, or several in one list: told when all of it is there."""
        match = self._form.lead.match(self._held, partial=True) if self._form.lead is not None else None
        if match is None:
            return self._refuse()
        if match.partial:
            return False
        self._scanned = max(self._scanned, match.end())
        end = self._span.end(self._held, self._scanned)
        if end is None:
            self._scanned = len(self._held)
            return False
        calls = self._calls_in(self._held[match.end() : end])
        if not calls:
            return self._refuse()
        for name, arguments in calls:
            self._begin(name)
            self._deltas.append(CallArguments(arguments))
        self._held = self._held[end:]
        self._closings = list(self._form.closings)
        self._step = self._read_closings
        return True

    def _begin(self, name: str) -> None:
        self._space = ""
        self._is_beginning = False
        self._deltas.append(CallBegun(self._form.new_id(), name))

    def _refuse(self) -> bool:
        """It is no call: its first characters are text, and what follows them is looked at again."""
        opening = next((one for one in self._form.openings if self._held.startswith(one)), self._held[:1])
        self._say(self._space + opening)
        self._space, self._held = "", self._held[len(opening) :]
        self._is_beginning = self._is_after_call = False
        self._step = self._read_text
        return True

    def _calls_in(self, text: str) -> list[tuple[str, str]]:
        """(name, arguments) of each; none where one of them is no call."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return []
        found = [self._call_in(one) for one in (value if isinstance(value, list) else [value])]
        calls = [call for call in found if call is not None]
        return calls if len(calls) == len(found) else []

    def _call_in(self, value: Any) -> tuple[str, str] | None:
        if not isinstance(value, dict):
            return None
        name, arguments = value.get("name"), value.get("arguments", value.get("parameters"))
        if not isinstance(name, str) or name not in self._names:
            return None
        if isinstance(arguments, str):
            return (name, arguments) if arguments.lstrip().startswith("{") else None
        if arguments is None or isinstance(arguments, dict):
            return name, json.dumps(arguments or {}, ensure_ascii=False)
        return None
