"""The tokens of one request as they arrive from the worker -> its events, in the client's process."""

from __future__ import annotations

from collections.abc import Callable, Set

from loraplex.engines.errors import EngineError
from loraplex.engines.events import Mailbox
from loraplex.engines.native.detokenizer import Detokenizer
from loraplex.engines.native.messages import Token
from loraplex.engines.protocol import TokenEvent


class Answer:
    """Puts them into the request's mailbox. `is_over` once the worker has nothing more to do for it.

    `ends` are tokens that end it, and part of its text only where that `includes_ends`; `stop` tells the worker that a
    stop string was met.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        detokenizer: Detokenizer,
        ends: Set[int],
        stop: Callable[[], None],
        *,
        includes_ends: bool = False,
        named_ends: Set[int] = frozenset(),
    ) -> None:
        """`named_ends` are those among them that the request names itself, other than an end of sequence."""
        self._mailbox = mailbox
        self._detokenizer = detokenizer
        self._ends = ends
        self._stop = stop
        self._includes_ends = includes_ends
        self._named_ends = named_ends
        self.is_over = False

    def add(self, token: Token, step: int) -> None:
        """What the worker sends behind the end is left out."""
        if self._mailbox.is_over:
            return
        try:
            event = self._event(token, step)
        except Exception as error:  # noqa: BLE001  a text that cannot be made ends its own answer and no other
            self._mailbox.fail(error)
            return
        if event.finish_reason is not None:
            self.is_over = True
            if token.finish_reason is None:
                self._stop()
        self._mailbox.put(event)

    def fail(self, error: EngineError) -> None:
        if not self.is_over:
            self.is_over = True
            self._mailbox.fail(error)

    def _event(self, token: Token, step: int) -> TokenEvent:
        """A token as the client sees it."""
        finish, detokenizer = token.finish_reason, self._detokenizer
        is_end = finish == "stop" and token.token_id in self._ends
        named = token.token_id if is_end and token.token_id in self._named_ends else None
        if is_end and not self._includes_ends:
            text = ""
        else:
            num_held = detokenizer.num_held
            text = detokenizer.feed(token.token_id)
            is_end = is_end and len(text) + detokenizer.num_held == num_held
        if finish is not None and not detokenizer.is_stopped:
            text += detokenizer.finish()
        return TokenEvent(
            request_id=token.request_id,
            token_ids=(token.token_id,),
            text=text,
            step=step,
            finish_reason="stop" if detokenizer.is_stopped else finish,
            stop_reason=named if detokenizer.met is None else detokenizer.met,
            is_end=is_end,
            num_held=detokenizer.num_held,
            num_cached_tokens=token.num_cached_tokens,
            queue_seconds=token.queue_seconds,
            logprobs=(token.logprobs,) if token.logprobs is not None else (),
            prompt_logprobs=(None, *token.prompt_logprobs) if token.prompt_logprobs else (),
        )
