"""A response's prompt: of all that was said, or of as many of its latest turns as the context holds."""

from typing import Any, NamedTuple

import msgspec
from litestar import Request

from loraplex.config.settings import Model
from loraplex.engines.errors import PromptTooLong
from loraplex.engines.protocol import Engine, GenerateRequest
from loraplex.engines.tokenizer_protocol import Tokenizer
from loraplex.gateway.catalogue import Route
from loraplex.gateway.openai.dialogue import MANY_MESSAGES, Dialogue
from loraplex.gateway.openai.responses_items import InputItem
from loraplex.gateway.openai.responses_request import ResponseRequest
from loraplex.gateway.prompts import apart, chat_choices, chat_prompt, chat_requests, tokenizer_for

_FEW_ITEMS = 32  # are rendered in a millisecond or two; of more it is looked in a thread how many fit


class Asked(NamedTuple):
    """A request's body, and whether it was large: then whatever passes over all of it does so in a thread."""

    body: ResponseRequest
    is_large: bool


class Prompting:
    """One response's prompt."""

    def __init__(
        self,
        request: Request[Any, Any, Any],
        asked: Asked,
        response_id: str,
        route: Route,
        engine: Engine,
        model: Model,
    ) -> None:
        self._request = request
        self._body, self._is_large = asked
        self._response_id = response_id
        self._route = route
        self._engine = engine
        self._model = model

    async def whole(self, earlier: list[InputItem]) -> tuple[Dialogue, list[GenerateRequest]]:
        """Raises PromptTooLong and what chat requests raise, naming the chat's fields."""
        tokenizer = await tokenizer_for(self._route, self._engine)
        is_large = self._is_large or len(earlier) > MANY_MESSAGES

        def made() -> Dialogue:
            return Dialogue(self._body.chat(earlier), tokenizer, self._model, is_large=is_large)

        dialogue = await apart(self._request, made, is_long=is_large)
        choices = await chat_requests(self._request, dialogue, self._response_id, self._route, self._engine)
        return dialogue, choices

    async def cut(self, earlier: list[InputItem]) -> tuple[Dialogue, list[GenerateRequest]]:
        """As many of the latest items as the context holds. Raises PromptTooLong where the last turn is too long."""
        items = [*earlier, *self._body.items]
        too_long = None
        if not self._is_large and len(items) <= _FEW_ITEMS:
            try:
                return await self.whole(earlier)
            except PromptTooLong as error:
                too_long = error
        tokenizer = await tokenizer_for(self._route, self._engine)
        fitting = _Fitting(self._body, tokenizer, self._model, self._engine.info().max_model_len)
        dialogue, prompt = await apart(self._request, lambda: fitting.latest(items, too_long), is_long=True)
        made = await chat_choices(self._request, dialogue, prompt, self._response_id, self._route, self._engine)
        return dialogue, made


class _Fitting:
    """Looks how much of a conversation the context holds. For any thread."""

    def __init__(self, body: ResponseRequest, tokenizer: Tokenizer, model: Model, max_model_len: int) -> None:
        self._body = body
        self._tokenizer = tokenizer
        self._model = model
        self._max_model_len = max_model_len

    def latest(self, items: list[InputItem], too_long: PromptTooLong | None) -> tuple[Dialogue, tuple[list[int], int]]:
        """All items, unless it is known that they are `too_long`, or the latest of them, and what `chat_prompt` gives.

        From the latest turn on, twice as many each time: nothing is rendered that has far more than fit. Raises as
        `Prompting.cut`.
        """
        if too_long is None:
            try:
                return self._prompt(items)
            except PromptTooLong as error:
                too_long = error
        # where the conversation may begin anew: what a user or the instructions say, no answer and no result
        starts = [place for place, item in enumerate(items) if item.kind == "message" and item.role != "assistant"]
        found = None
        fit, too_many, tried = 0, len(starts), 1  # turns
        while too_many - fit > 1:
            try:
                found, fit = self._prompt(items[starts[-tried] :]), tried
            except PromptTooLong as error:
                too_long, too_many = error, tried
            tried = min(2 * fit, (fit + too_many) // 2)
        if found is None:
            raise too_long
        return found

    def _prompt(self, items: list[InputItem]) -> tuple[Dialogue, tuple[list[int], int]]:
        body = msgspec.structs.replace(self._body, input=items)
        dialogue = Dialogue(body.chat([]), self._tokenizer, self._model)
        return dialogue, chat_prompt(dialogue, self._max_model_len)
