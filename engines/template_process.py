"""Chat templates that adapters bring, run in a process of their own, which is bounded in time and memory.

A base's template is the operator's choice; an adapter's is that of whoever registered it, and jinja's sandbox bounds
neither how long a template runs nor how much it holds. Even to compile one is to run parts of it.

    python -m loraplex.engines.template_process
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from functools import lru_cache
from typing import Any

import msgspec

from loraplex.engines.chat_template import ChatTemplate
from loraplex.engines.errors import InvalidRequest
from loraplex.engines.tokenizer_protocol import ChatMessage

MAX_CPU_SECONDS = 2.0  # of computing, so that a busy machine does not count
MAX_BYTES = 2**30
_MAX_CHARACTERS = 2**24  # of one conversation
_LARGE = 256 * 2**10  # KiB that a process may have held and still be kept
_ENVIRONMENT = ("PATH", "PYTHONPATH", "TZ", "LANG", "LC_ALL")  # nothing of the gateway's secrets


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

    `is_last` where the process has grown so large that it ends itself.
    """

    text: str = ""
    variables: tuple[str, ...] = ()
    error: str | None = None
    param: str | None = None
    is_last: bool = False


class TemplateExhausted(Exception):
    """The template's process was ended for what it used up. Whoever asked says what that means to a request."""

    def __init__(self) -> None:
        super().__init__(
            f"the adapter's chat template took more than {MAX_CPU_SECONDS:g} s of computing "
            f"or {MAX_BYTES // 2**20} MiB of memory, and was ended"
        )


class TemplateProcess:
    """The process, begun when it is first needed and again after it was ended. For any thread, one work at a time."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, work: Work) -> Rendered:
        """Blocks. Raises TemplateExhausted."""
        with self._guard:
            if self._process is None:
                self._process = _begin()
            assert self._process.stdin is not None, "it is a pipe"
            assert self._process.stdout is not None, "it is a pipe"
            try:
                self._process.stdin.write(msgspec.json.encode(work) + b"\n")
                self._process.stdin.flush()
                line = self._process.stdout.readline()
            except (OSError, ValueError):  # ended meanwhile, or closed
                line = b""
            if not line.endswith(b"\n"):
                self._end()
                raise TemplateExhausted
            rendered = msgspec.json.decode(line, type=Rendered)
            if rendered.is_last:
                self._end()
        return rendered

    def close(self) -> None:
        """End the process."""
        process = self._process
        if process is not None:
            process.kill()  # whoever waits for it learns so
        with self._guard:
            self._end()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _begin() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "loraplex.engines.template_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
    )


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


def _answer(line: bytes) -> Rendered:
    try:
        rendered = _rendered(msgspec.json.decode(line, type=Work))
        rendered.text.encode()  # a lone surrogate is no text
        return rendered
    except InvalidRequest as error:
        return Rendered(error=str(error).encode(errors="replace").decode(), param=error.param)
    except Exception as error:  # noqa: BLE001  whatever a foreign template breaks is its own fault
        return Rendered(error=f"{type(error).__name__}: {ascii(str(error))[1:-1][:300]}")


def _is_large() -> bool:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > _LARGE


def main() -> None:
    """Answer each line of work with a line, until there is no more; a template may leave much behind in its cache."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, MAX_CPU_SECONDS)
        answer = _answer(line)
        signal.setitimer(signal.ITIMER_PROF, 0)
        is_last = _is_large()
        sys.stdout.buffer.write(msgspec.json.encode(msgspec.structs.replace(answer, is_last=is_last)) + b"\n")
        sys.stdout.buffer.flush()
        if is_last:
            return


if __name__ == "__main__":
    main()
