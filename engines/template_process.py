"""Chat templates that adapters bring, run in a process of their own, which is bounded in time and memory.

A base's template is the operator's choice; an adapter's is that of whoever registered it, and jinja's sandbox bounds
neither how long a template runs nor how much it holds. Even to compile one is to run parts of it.

    python -m loraplex.engines.template_process
"""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

import msgspec

from loraplex.engines.bounded_process import BoundedProcess, ProcessExhausted, answer_lines
from loraplex.engines.chat_template import ChatTemplate
from loraplex.engines.errors import InvalidRequest
from loraplex.engines.tokenizer_protocol import ChatMessage

MAX_CPU_SECONDS = 2.0  # of computing, so that a busy machine does not count
MAX_BYTES = 2**30
_MOST_TOLD = 2000  # characters of what a template says is wrong
_MAX_CHARACTERS = 2**24  # of one conversation


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """What `ChatTemplate.render` is given."""

    messages: tuple[ChatMessage, ...]
    add_generation_prompt: bool
    continue_final_message: bool
    tools: tuple[dict[str, Any], ...]
    variables: dict[str, Any]


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """A template's texts by name and its special tokens; without a conversation it is only read."""

    sources: dict[str, str]
    special_tokens: dict[str, Any]
    conversation: Conversation | None = None


class Rendered(msgspec.Struct, frozen=True, kw_only=True):
    """The text, or what is wrong, and the names that the template reads. `param` is that of InvalidRequest.

    `seconds` is what it took of computing.
    """

    text: str = ""
    variables: tuple[str, ...] = ()
    error: str | None = None
    param: str | None = None
    seconds: float = 0.0


class TemplateExhausted(Exception):
    """The template's process was ended for what it used up. Whoever asked says what that means to a request."""

    def __init__(self) -> None:
        super().__init__(
            f"the adapter's chat template took more than {MAX_CPU_SECONDS:g} s of computing "
            f"or {MAX_BYTES // 2**20} MiB of memory, and was ended"
        )


class TemplateProcesses:
    """Two, so that what is quick waits for nothing slow; each begun when it is first needed and after each end.

    For any thread; a process does one work at a time.
    """

    def __init__(self) -> None:
        self._quick, self._slow = (BoundedProcess("loraplex.engines.template_process") for _ in range(2))

    def ask(self, work: Work, *, is_slow: bool) -> Rendered:
        """Blocks. Raises TemplateExhausted."""
        process = self._slow if is_slow else self._quick
        try:
            return msgspec.json.decode(process.ask(msgspec.json.encode(work)), type=Rendered)
        except ProcessExhausted:
            raise TemplateExhausted from None

    def close(self) -> None:
        """End the processes."""
        self._quick.close()
        self._slow.close()


@lru_cache(maxsize=64)
def _template(encoded: bytes) -> ChatTemplate:
    work = msgspec.json.decode(encoded, type=Work)
    return ChatTemplate(work.sources, work.special_tokens)


def _rendered(work: Work) -> Rendered:
    template = _template(msgspec.json.encode(msgspec.structs.replace(work, conversation=None)))
    wish = work.conversation
    if wish is None:
        return Rendered(variables=tuple(sorted(template.variables)))
    text = template.render(
        wish.messages,
        add_generation_prompt=wish.add_generation_prompt,
        continue_final_message=wish.continue_final_message,
        tools=wish.tools,
        variables=wish.variables,
    )
    if len(text) > _MAX_CHARACTERS:
        return Rendered(error=f"the chat template makes more than {_MAX_CHARACTERS} characters of it", param="messages")
    return Rendered(text=text)


def _timed(line: bytes) -> Rendered:
    begin = time.process_time()
    rendered = _answer(line)
    return msgspec.structs.replace(rendered, seconds=time.process_time() - begin)


def _answer(line: bytes) -> Rendered:
    try:
        rendered = _rendered(msgspec.json.decode(line, type=Work))
        rendered.text.encode()  # a lone surrogate is no text
        return rendered
    except InvalidRequest as error:
        return Rendered(error=str(error)[:_MOST_TOLD].encode(errors="replace").decode(), param=error.param)
    except Exception as error:  # noqa: BLE001  whatever a foreign template breaks is its own fault
        return Rendered(error=f"{type(error).__name__}: {ascii(str(error))[1:-1][:300]}")


def main() -> None:
    answer_lines(lambda line: msgspec.json.encode(_timed(line)), cpu_seconds=MAX_CPU_SECONDS, max_bytes=MAX_BYTES)


if __name__ == "__main__":
    main()
