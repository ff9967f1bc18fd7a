"""What tenants asked to have kept: prompts and answers of those that opted in, a line of JSON for each request.

Nothing of anybody else is ever written here, nor any key. The file is its owner's alone (mode 0600) and opened anew
for every line, so that it may be moved away at any time; a line is one write at its end, so that gateways may share it.
One that was cut short, by a full disk or a process that was killed, spoils no other.
"""

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from loraplex.auth.caller import Caller
from loraplex.auth.metering import Demand
from loraplex.engines.protocol import FinishReason, GenerateRequest, TokenEvent
from loraplex.engines.tokenizer_protocol import Tokenizer

_log = logging.getLogger("loraplex.gateway")


class Answered(msgspec.Struct):
    """One choice as the model wrote it, as far as it came; `prompt` is its place among the prompts."""

    prompt: int
    text: str = ""
    finish_reason: FinishReason | None = None


class Line(msgspec.Struct, frozen=True):
    """One request. `at` is its begin, seconds since 1970; prompts are as the model read them, special tokens too."""

    at: float
    request_id: str
    route: str
    tenant_id: str
    key_id: str
    model: str
    prompts: list[str]
    answers: list[Answered]
    outcome: str


class PromptLog:
    """Appends to one file, which is made with its first line."""

    def __init__(self, path: str) -> None:
        self._path = Path(path).expanduser()

    def record(
        self, caller: Caller, demand: Demand, choices: Sequence[GenerateRequest], per_prompt: int, tokenizer: Tokenizer
    ) -> "Record":
        """One request of a caller that opted in, from its begin; `per_prompt` choices stand together for a prompt."""
        prompts = [
            tokenizer.decode(choice.prompt_token_ids, skip_special_tokens=False) for choice in choices[::per_prompt]
        ]
        answers = [Answered(number // per_prompt) for number in range(len(choices))]
        line = Line(
            time.time(), demand.trace_id, demand.route, caller.tenant_id, caller.key_id, demand.model, prompts, answers,
            "running",
        )  # fmt: skip
        return Record(self, line)

    def append(self, line: Line) -> None:
        """A file that cannot be written to is told in the server's log; the request has its answer all the same."""
        encoded = msgspec.json.encode(line) + b"\n"
        try:
            file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.fchmod(file, 0o600)  # whoever made it
                if _is_cut_short(file):
                    encoded = b"\n" + encoded
                if os.write(file, encoded) < len(encoded):
                    _log.error("the disk has no room for the log of prompts, request %s is cut short", line.request_id)
            finally:
                os.close(file)
        except OSError as error:
            _log.error("the log of prompts lacks request %s: %s", line.request_id, error)


def _is_cut_short(file: int) -> bool:
    """Whether its last line has no end; a pipe has none and no size either."""
    size = os.fstat(file).st_size
    return size > 0 and os.pread(file, 1, size - 1) != b"\n"


class Record:
    """One request while it runs."""

    def __init__(self, log: PromptLog, line: Line) -> None:
        self._log = log
        self._line = line

    def saw(self, number: int, event: TokenEvent) -> None:
        """What a choice goes on with."""
        answer = self._line.answers[number]
        answer.text += event.text
        answer.finish_reason = event.finish_reason

    def end(self, outcome: str) -> None:
        """The request is over."""
        self._log.append(msgspec.structs.replace(self._line, outcome=outcome))
