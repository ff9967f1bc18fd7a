"""The tokens of one request as an upstream tells them -> its events, with the text that they are here.

A server may tell why an answer ended behind its last token. So a token that may be the last is held until more comes,
and so is one that completes a stop string: what the upstream knows of the whole answer comes with its end.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from msgspec.structs import replace

from loraplex.engines.events import Mailbox
from loraplex.engines.native.detokenizer import Detokenizer
from loraplex.engines.protocol import FinishReason, GenerateRequest, StopReason, TokenEvent, TokenLogprobs


class Answer:
    """Puts events into the request's mailbox. Once it `is_stopped` a stop string was met: what follows is not of it.

    `ends` are tokens that may end it, `named_ends` those of them that the request names itself.
    """

    def __init__(
        self,
        request: GenerateRequest,
        mailbox: Mailbox,
        detokenizer: Detokenizer,
        ends: Set[int],
        named_ends: Set[int],
    ) -> None:
        self._request = request
        self._mailbox = mailbox
        self._detokenizer = detokenizer
        self._ends = ends
        self._named_ends = named_ends
        self._held: tuple[int, tuple[TokenLogprobs, ...]] | None = None
        self._stopping: TokenEvent | None = None
        self._prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
        self._num_steps = 0
        self.num_tokens = 0
        self.num_cached_tokens = 0  # of the prompt, once it is over

    @property
    def is_stopped(self) -> bool:
        return self._stopping is not None

    def tell_prompt(self, logprobs: tuple[TokenLogprobs | None, ...]) -> None:
        """With the first event."""
        self._prompt_logprobs = logprobs

    def add(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        """The next tokens, each with its log-probabilities where those were asked for."""
        self._num_steps += 1
        for place, token_id in enumerate(token_ids):
            self._release()
            if self.is_stopped:
                return
            self.num_tokens += 1
            self._held = token_id, tuple(logprobs[place : place + 1])
            if token_id not in self._ends and self.num_tokens < self._request.sampling.max_tokens:
                self._release()

    def end(self, reason: FinishReason, stop_reason: StopReason, num_cached_tokens: int) -> None:
        """Nothing more comes, for this reason unless a stop string was met here."""
        event = self._last(reason, stop_reason) if self._stopping is None else self._stopping
        self.num_cached_tokens = num_cached_tokens
        self._mailbox.put(replace(event, num_cached_tokens=num_cached_tokens))

    def _release(self) -> None:
        """The held token is not the last one, or it completes a stop string."""
        if self._held is None:
            return
        (token_id, logprobs), self._held = self._held, None
        text = self._detokenizer.feed(token_id)
        event = self._event((token_id,), text, logprobs)
        if self._detokenizer.is_stopped:
            self._stopping = replace(event, finish_reason="stop", stop_reason=self._detokenizer.met)
        else:
            self._mailbox.put(event)

    def _last(self, reason: FinishReason, stop_reason: StopReason) -> TokenEvent:
        detokenizer, text, is_end = self._detokenizer, "", False
        token_ids: tuple[int, ...] = ()
        logprobs: tuple[TokenLogprobs, ...] = ()
        named: StopReason = stop_reason if isinstance(stop_reason, str) else None
        if self._held is not None:
            token_id, logprobs = self._held
            token_ids = (token_id,)
            is_end = reason == "stop" and token_id in self._ends
            if is_end and token_id in self._named_ends:
                named = token_id
            if not is_end or self._request.sampling.includes_stop:
                num_held = detokenizer.num_held
                text = detokenizer.feed(token_id)
                is_end = is_end and len(text) + detokenizer.num_held == num_held
        if not detokenizer.is_stopped:
            text += detokenizer.finish()
        event = self._event(token_ids, text, logprobs)
        if detokenizer.is_stopped:
            return replace(event, finish_reason="stop", stop_reason=detokenizer.met, is_end=is_end)
        return replace(event, finish_reason=reason, stop_reason=named, is_end=is_end)

    def _event(self, token_ids: tuple[int, ...], text: str, logprobs: tuple[TokenLogprobs, ...]) -> TokenEvent:
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, ()
        return TokenEvent(
            request_id=self._request.request_id,
            token_ids=token_ids,
            text=text,
            step=self._num_steps,
            num_held=self._detokenizer.num_held,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
