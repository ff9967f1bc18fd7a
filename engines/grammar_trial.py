"""Large grammars are compiled once in a process of their own first, which may break over them.

llguidance bounds how deeply a grammar is nested, but follows rules that name one another as far as they go, until the
stack is gone and the process with it. Here they have a smaller stack than where they are used, so that what passes has
room there, and bounded time. Tokens are bytes: what a grammar's rules do to the compiler does not depend on them.

    python -m loraplex.engines.grammar_trial
"""

from __future__ import annotations

import threading
import time
from queue import SimpleQueue

import msgspec
from llguidance import LLTokenizer

from loraplex.engines.bounded_process import BoundedProcess, ProcessExhausted, answer_lines
from loraplex.engines.errors import InvalidRequest
from loraplex.engines.matching import in_short, match, refusal
from loraplex.engines.protocol import Grammar

# Characters of a source that cannot do harm: llguidance follows a thousand rules, which take more.
_HARMLESS = 4096
_CPU_SECONDS = 10.0
_MASK_SECONDS = 0.02  # that a step waits for what may come first; others are as long
_MAX_BYTES = 4 * 2**30
_STACK_BYTES = 2 * 2**20  # a quarter of a main thread's


class GrammarTrial:
    """So many processes, each begun when it is first needed. For as many threads."""

    def __init__(self, num_processes: int = 1) -> None:
        self._processes = [BoundedProcess("loraplex.engines.grammar_trial") for _ in range(num_processes)]
        self._free: SimpleQueue[BoundedProcess] = SimpleQueue()
        for process in self._processes:
            self._free.put(process)

    def check(self, grammar: Grammar) -> None:
        """Raises InvalidRequest where it cannot be compiled, or breaks what compiles it. Blocks."""
        if len(grammar.source) <= _HARMLESS:
            return
        process = self._free.get()
        try:
            reason = process.ask(msgspec.json.encode(grammar)).decode()
        except ProcessExhausted:
            raise refusal(
                grammar, f"its rules go too deep, or it takes more than {_CPU_SECONDS:g} s to compile"
            ) from None
        finally:
            self._free.put(process)
        if reason:
            raise InvalidRequest(reason, "grammar")

    def close(self) -> None:
        for process in self._processes:
            process.close()


def _tried(grammar: Grammar, tokenizer: LLTokenizer) -> str:
    """What is wrong with it, or nothing."""
    try:
        matcher = match(grammar, tokenizer)
        matcher.compute_bitmask()
        began = time.thread_time()
        matcher.deep_copy().compute_bitmask()
        seconds = time.thread_time() - began
    except InvalidRequest as error:
        return str(error)
    except BaseException as error:  # noqa: BLE001  in Rust it may panic, which is no Exception
        return str(refusal(grammar, in_short(str(error))))
    if matcher.is_error():
        return str(refusal(grammar, matcher.get_error()))
    if seconds > _MASK_SECONDS:
        return str(refusal(grammar, f"what may come next takes {seconds * 1e3:.0f} ms a token to find"))
    return ""


def _answer(line: bytes) -> bytes:
    """In a thread, for its stack."""
    grammar, found = msgspec.json.decode(line, type=Grammar), [""]

    def try_it() -> None:
        found[0] = _tried(grammar, LLTokenizer("byte"))

    thread = threading.Thread(target=try_it)
    thread.start()
    thread.join()
    return found[0].encode(errors="replace").replace(b"\n", b" ")


def main() -> None:
    threading.stack_size(_STACK_BYTES)
    answer_lines(_answer, cpu_seconds=_CPU_SECONDS, max_bytes=_MAX_BYTES)


if __name__ == "__main__":
    main()
