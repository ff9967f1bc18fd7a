"""What the echo engine says: its tokenizer, and the tokens and texts of an answer, one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loraplex.engines.events import Mailbox
from loraplex.engines.protocol import FinishReason, GenerateRequest, TokenEvent, TokenLogprobs
from loraplex.engines.stop_strings import StopStrings
from loraplex.engines.tokenizer_protocol import ChatMessage, Room, TokenSpan

EOS = 256


class EchoTokenizer:
    """UTF-8 bytes as token ids; a chat is its contents, one a line, and neither tools nor variables show in it."""

    eos_token_ids = special_token_ids = frozenset({EOS})
    chat_template: str | None = ""
    template_variables = frozenset({"tools", "enable_thinking", "reasoning_effort"})
    renders_apart = False

    def encode(self, text: str, *, add_special_tokens: bool = True, room: Room | None = None) -> list[int]:
        tokens = list(text.encode())
        return tokens[-room.most :] if room is not None and room.keeps_end else tokens

    def spans(self, text: str, *, add_special_tokens: bool = True, room: Room | None = None) -> list[TokenSpan]:
        """Every byte of a character stands where the character does."""
        return [TokenSpan(byte, at, at + 1) for at, character in enumerate(text) for byte in character.encode()]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        if EOS not in token_ids:
            return bytes(token_ids).decode(errors="replace")
        kept = (token for token in token_ids if token < EOS or not skip_special_tokens)
        return b"".join(self.token_bytes(token) for token in kept).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < EOS else b"<eos>"

    def token_name(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("latin-1")

    def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
        room: Room | None = None,
    ) -> list[int]:
        return self.encode("\n".join(message.content for message in messages if message.content), room=room)


class Speech:
    """What one request is answered with, and how far it is said."""

    __slots__ = (
        "_limit", "_met", "_num_logprobs", "_pending", "_request", "_request_id", "_tokens", "deaths", "fails",
        "is_faulty", "is_left", "is_over", "is_slow", "mailbox", "num_said",
    )  # fmt: skip

    def __init__(self, request: GenerateRequest, room: int, mailbox: Mailbox, deaths: int) -> None:
        """`deaths` are those of the engine before the request."""
        prompt = EchoTokenizer().decode(request.prompt_token_ids)
        self.fails = "<fail>" in prompt
        self.is_faulty = self.fails or "<die>" in prompt
        self.is_slow = "<slow>" in prompt
        self.is_left = self.is_over = False
        self.num_said = 0
        self.mailbox = mailbox
        self.deaths = deaths
        self._request = request
        self._request_id = request.request_id
        self._num_logprobs = request.sampling.num_logprobs
        self._tokens, self._met = _answer(request, prompt)
        self._limit = min(request.sampling.max_tokens, room)
        self._pending = b""  # of a character that is not complete

    def say(self, step: int) -> TokenEvent:
        """The next token."""
        token = self._tokens[self.num_said]
        self.num_said += 1
        if token < 128 and not self._pending:
            text = chr(token)
        else:
            self._pending, text = _whole_characters(self._pending + bytes([token] if token != EOS else []))
        finish: FinishReason | None = "stop" if token == EOS else "length" if self.num_said == self._limit else None
        self.is_over = finish is not None
        return TokenEvent(
            request_id=self._request_id,
            token_ids=(token,),
            text=text,
            step=step,
            finish_reason=finish,
            stop_reason=self._met if token == EOS else None,
            is_end=token == EOS,
            logprobs=() if self._num_logprobs is None else _certainty(self._num_logprobs, token),
            prompt_logprobs=_prompt_certainty(self._request) if self.num_said == 1 else (),
        )


def _answer(request: GenerateRequest, prompt: str) -> tuple[tuple[int, ...], str | None]:
    """The tokens of the whole answer, however few are asked for, and the stop string that ends it."""
    whole = f"{composed(request)}: {prompt}" if request.parts else prompt
    sampling = request.sampling
    stops = StopStrings(sampling.stop, includes_stop=sampling.includes_stop)
    exempt = whole.encode()[: sampling.min_tokens].decode(errors="ignore")
    said = stops.feed(exempt, may_stop=False) + stops.feed(whole[len(exempt) :]) + stops.finish()
    return (*said.encode(), EOS), stops.met


def composed(request: GenerateRequest) -> str:
    """The adapter's name, or those of a composition with their weights: `one*0.5+two*2`."""
    if request.adapter is not None:
        return request.adapter.name
    return "+".join(f"{part.adapter.name}*{part.weight:g}" for part in request.composition)


def _certainty(num_logprobs: int | None, token: int) -> tuple[TokenLogprobs, ...]:
    """An echo is certain of its only token."""
    if num_logprobs is None:
        return ()
    return (TokenLogprobs(0.0, ((token, 0.0),) if num_logprobs else ()),)


def _prompt_certainty(request: GenerateRequest) -> tuple[TokenLogprobs | None, ...]:
    wanted = request.sampling.num_prompt_logprobs
    if wanted is None:
        return ()
    told = [one for token in request.prompt_token_ids[1:] for one in _certainty(wanted, token)]
    return (None, *told) if told else ()


def _whole_characters(data: bytes) -> tuple[bytes, str]:
    """(bytes of an incomplete last character, text of the complete ones)."""
    for cut in range(len(data), max(len(data) - 4, -1), -1):
        try:
            return data[cut:], data[:cut].decode()
        except UnicodeDecodeError:
            continue
    return b"", data.decode(errors="replace")
