"""The JSON of LoRAX's requests; unlike LoRAX, a field that is unknown or not offered is refused by name.

Everything optional may be null. What the types cannot say is checked in `check`, in LoRAX's own words where its
clients know them.
"""

import json
from collections.abc import Iterator
from typing import Any, Literal

from msgspec import Struct

from loraplex.engines.protocol import Grammar
from loraplex.gateway.errors import MalformedRequest, UnsupportedParameter
from loraplex.gateway.openai.wire import MAX_STOP_CHARACTERS
from loraplex.gateway.request_adapters import MergedAdapters

MAX_BEST_OF = 16
MAX_STOP_SEQUENCES = 16
MAX_ALTERNATIVES = 100

MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100  # beyond, logits leave what floats can hold

_PENALTIES = f"must be >= {MIN_REPETITION_PENALTY} and <= {MAX_REPETITION_PENALTY}"
_ANY_OBJECT = '{"type": "object"}'


class ResponseFormat(Struct, forbid_unknown_fields=True):
    """A type that asks for JSON without saying a schema means any JSON object."""

    type: Literal["text", "json_object", "json_schema", "Text", "JsonObject", "JsonSchema"]
    schema: dict[str, Any] | str | None = None

    def grammar(self) -> Grammar | None:
        if self.type.lower() == "text":
            return None
        schema = _ANY_OBJECT if self.schema is None or self.schema == {} else self.schema
        source = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
        return Grammar(kind="json_schema", source=source)


class Parameters(Struct, forbid_unknown_fields=True, kw_only=True):
    """How to generate, all of it optional.

    `adapter_id` is a model of the catalogue, or where its tenant may an address; `api_token` is for the adapter's
    source, never for this server.
    """

    adapter_id: str | None = None
    adapter_source: str | None = None
    merged_adapters: MergedAdapters | None = None
    api_token: str | None = None
    best_of: int | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: bool | None = None
    max_new_tokens: int | None = None
    ignore_eos_token: bool | None = None
    return_full_text: bool | None = None
    stop: list[str] | None = None
    seed: int | None = None
    truncate: int | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    return_k_alternatives: int | None = None
    response_format: ResponseFormat | None = None
    # known, not offered
    watermark: bool | None = None
    apply_chat_template: bool | None = None

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random. As in LoRAX, a filter or a temperature asks for it, and 0 never does."""
        if self.temperature == 0:
            return False
        is_filtered = self.top_k is not None or self.typical_p is not None or (self.top_p or 1.0) < 1.0
        return bool(self.do_sample) or is_filtered or self.temperature not in (None, 1.0)

    @property
    def num_answers(self) -> int:
        return self.best_of or 1

    @property
    def wants_details(self) -> bool:
        return bool(self.details or self.decoder_input_details)

    def check(self, *, streams: bool) -> None:
        """Raises UnsupportedParameter or MalformedRequest, naming the field."""
        for field in ("watermark", "apply_chat_template"):
            if getattr(self, field):
                raise UnsupportedParameter(f"`{field}` is not offered by this server", field)
        for field, is_good, rule in self._rules():
            if getattr(self, field) is not None and not is_good:
                raise MalformedRequest(f"`{field}` {rule}", field)
        if streams and self.num_answers > 1:
            raise MalformedRequest("`best_of` != 1 is not supported when streaming tokens", "best_of")
        if streams and self.decoder_input_details:
            message = "`decoder_input_details` == true is not supported when streaming tokens"
            raise MalformedRequest(message, "decoder_input_details")
        if self.num_answers > 1 and not self.samples:
            raise MalformedRequest("you must use sampling when `best_of` is > 1", "best_of")
        if self.num_answers > 1 and self.seed is not None:
            raise MalformedRequest("`seed` must not be set when `best_of` > 1", "seed")

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        """(field, whether its value is good where it is set, what it must be)"""
        best_of, stop, seed = self.best_of or 0, self.stop or [], self.seed or 0
        yield "best_of", 0 < best_of <= MAX_BEST_OF, f"must be > 0 and <= {MAX_BEST_OF}. Given: {best_of}"
        yield "temperature", (self.temperature or 0) >= 0, "must be non-negative"
        penalty = self.repetition_penalty or 0
        yield "repetition_penalty", penalty > 0, "must be strictly positive"
        yield "repetition_penalty", MIN_REPETITION_PENALTY <= penalty <= MAX_REPETITION_PENALTY, _PENALTIES
        yield "frequency_penalty", -2 <= (self.frequency_penalty or 0) <= 2, "must be >= -2.0 and <= 2.0"
        yield "presence_penalty", -2 <= (self.presence_penalty or 0) <= 2, "must be >= -2.0 and <= 2.0"
        yield "top_k", (self.top_k or 0) > 0, "must be strictly positive"
        yield "top_p", 0 < (self.top_p or 0) <= 1, "must be > 0.0 and <= 1.0"
        yield "typical_p", 0 < (self.typical_p or 0) < 1, "must be > 0.0 and < 1.0"
        yield "max_new_tokens", (self.max_new_tokens or 0) > 0, "must be strictly positive"
        yield "truncate", (self.truncate or 0) > 0, "must be strictly positive"
        many = f"supports up to {MAX_STOP_SEQUENCES} stop sequences. Given: {len(stop)}"
        yield "stop", len(stop) <= MAX_STOP_SEQUENCES, many
        yield "stop", "" not in stop, "must not hold an empty text"
        long = f"supports stop sequences of up to {MAX_STOP_CHARACTERS} characters"
        yield "stop", all(len(one) <= MAX_STOP_CHARACTERS for one in stop), long
        yield "seed", 0 <= seed < 2**64, "must be >= 0 and < 2^64"
        alternatives = f"must be > 0 and <= {MAX_ALTERNATIVES}"
        yield "return_k_alternatives", 0 < (self.return_k_alternatives or 0) <= MAX_ALTERNATIVES, alternatives


class LoraxRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """`stream` is for the routes that can do both."""

    inputs: str
    parameters: Parameters | None = None
    stream: bool | None = None

    def check(self, *, streams: bool) -> Parameters:
        """Its parameters, or the defaults. Raises UnsupportedParameter or MalformedRequest, naming the field."""
        if not self.inputs:
            raise MalformedRequest("`inputs` cannot be empty", "inputs")
        parameters = self.parameters or Parameters()
        parameters.check(streams=streams)
        return parameters
