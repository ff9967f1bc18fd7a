"""The tokenizer and chat template that an adapter ships, beside those of its base.

An adapter's template renders in one of `TemplateProcesses`. What its vocabulary changes is found by `changed_parts`,
in a process too; the tokenizer is then made of the base's own. What an adapter ships as the base has it is the base's
and costs nothing.
"""

from __future__ import annotations

import asyncio
import filecmp
import json
import sys
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from loraplex.engines.adapters.flights import SingleFlight
from loraplex.engines.adapters.vocabulary import changed_parts, read_json, stated_tokens
from loraplex.engines.chat_template import ChatTemplate, special_tokens, template_sources
from loraplex.engines.codecs import Codec, JsonCodec
from loraplex.engines.errors import AdapterError, AdapterInvalid, AdapterNotFound, AdapterUnsupported, InvalidRequest
from loraplex.engines.protocol import Adapter
from loraplex.engines.template_process import Conversation, Rendered, TemplateExhausted, TemplateProcesses, Work
from loraplex.engines.tokenizer import HubTokenizer, Template, TemplatedTokenizer
from loraplex.engines.tokenizer_protocol import ChatMessage

_MAX_BYTES = 256 * 2**20  # of tokenizers held, as their files count
_LEAST_BYTES = 1024  # what one without files counts
_COMPILED = 20  # a template that runs here takes so many times its source
_REST_SECONDS = 30.0  # before a template that used up its process is tried again
_QUICK_SECONDS = 0.1  # of computing; what takes longer is slow, and for a while renders where it keeps up nobody else
_SLOW_SECONDS = 60.0


class BroughtTemplate:
    """Implements Template by way of TemplateProcesses. Blocks."""

    def __init__(self, sources: Mapping[str, str], tokens: Mapping[str, object], processes: TemplateProcesses) -> None:
        """Raises AdapterInvalid where it is no template."""
        self._processes = processes
        self._work = Work(sources=dict(sources), special_tokens=dict(tokens))
        self._rests_until = self._is_slow_until = 0.0
        self.source = sources["default"]
        try:
            read = processes.ask(self._work, is_slow=True)  # nobody knows it yet
        except TemplateExhausted as error:
            raise AdapterInvalid(str(error)) from error
        if read.error is not None:
            raise AdapterInvalid(f"its chat template cannot be read: {read.error}")
        self.variables = frozenset(read.variables)

    def render(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text. Raises InvalidRequest where the template refuses it, or uses up its process."""
        conversation = Conversation(
            messages=tuple(messages),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tuple(dict(tool) for tool in tools),
            variables=dict(variables or {}),
        )
        rendered = self._rendered(conversation)
        if rendered.error is not None:
            raise InvalidRequest(rendered.error, rendered.param or "messages")
        return rendered.text

    def _rendered(self, conversation: Conversation) -> Rendered:
        now = time.monotonic()
        if now < self._rests_until:
            return Rendered(error=str(TemplateExhausted()))
        work = msgspec.structs.replace(self._work, conversation=conversation)
        try:
            rendered = self._processes.ask(work, is_slow=now < self._is_slow_until)
        except TemplateExhausted as error:
            self._rests_until = time.monotonic() + _REST_SECONDS
            return Rendered(error=str(error))
        if rendered.seconds > _QUICK_SECONDS:
            self._is_slow_until = time.monotonic() + _SLOW_SECONDS
        return rendered


class AdapterTokenizer(TemplatedTokenizer):
    """An adapter's; its answers end where the base's do, and at its own end-of-sequence token."""

    def __init__(self, base: HubTokenizer, codec: Codec, template: Template | None, own_ends: frozenset[int]) -> None:
        super().__init__(codec, template, base.eos_token_ids | own_ends)
        self.own_ends = own_ends

    @property
    def renders_apart(self) -> bool:
        return isinstance(self.template, BroughtTemplate)


class AdapterTokenizers:
    """Those of all adapters, by the hash of their content. For one event loop; reading is done in threads."""

    def __init__(self, base: HubTokenizer, num_rows: int) -> None:
        """The model's embeddings have `num_rows`."""
        self._base = base
        self._num_rows = num_rows
        self._processes = TemplateProcesses()
        self._known: OrderedDict[str, tuple[AdapterTokenizer | None, int]] = OrderedDict()
        self._num_bytes = 0
        self._own_bytes = _LEAST_BYTES  # of a vocabulary that is not the base's
        self._flights: SingleFlight[str, AdapterTokenizer | None] = SingleFlight()

    async def of(self, adapter: Adapter) -> TemplatedTokenizer:
        """The adapter's, or the base's where it ships nothing else. Raises AdapterError."""
        if adapter.id in self._known:
            self._known.move_to_end(adapter.id)
            return self._known[adapter.id][0] or self._base
        return await self._flights.join(adapter.id, lambda: self._read(adapter)) or self._base

    async def close(self) -> None:
        await self._flights.cancel_all()
        await asyncio.to_thread(self._processes.close)

    async def _read(self, adapter: Adapter) -> AdapterTokenizer | None:
        directory = Path(adapter.path)
        try:
            found = await asyncio.to_thread(self._made, directory)
        except (AdapterError, OSError, ValueError) as error:
            if not directory.is_dir():  # noqa: ASYNC240  a stat of a local disk
                raise AdapterNotFound("the adapter's files left the cache just now; try again") from error
            raise error if isinstance(error, AdapterError) else AdapterInvalid(f"its tokenizer: {error}") from error
        is_own = found is not None and found.codec is not self._base.codec
        num_bytes = self._own_bytes if is_own else _LEAST_BYTES
        if found is not None and found.template is not self._base.template:
            num_bytes += _template_bytes(found.template)
        self._keep(adapter.id, found, num_bytes)
        return found

    def _keep(self, adapter_id: str, found: AdapterTokenizer | None, num_bytes: int) -> None:
        self._known[adapter_id] = found, num_bytes
        self._num_bytes += num_bytes
        while self._num_bytes > _MAX_BYTES and len(self._known) > 1:
            _, (_, num_freed) = self._known.popitem(last=False)
            self._num_bytes -= num_freed

    def _made(self, directory: Path) -> AdapterTokenizer | None:
        if not directory.is_dir():
            raise AdapterNotFound("the adapter's files are gone")
        own = read_json(directory / "special_tokens_map.json") | read_json(directory / "tokenizer_config.json")
        codec = self._codec(directory)
        template = self._template(directory, own)
        ends = self._own_ends(codec, own)
        if codec is self._base.codec and template is self._base.template and not ends:
            return None
        return AdapterTokenizer(self._base, codec, template, ends)

    def _codec(self, directory: Path) -> Codec:
        base, path = self._base.codec, directory / "tokenizer.json"
        stated = stated_tokens(directory)
        is_same = not path.is_file() or _are_same(path, self._base.directory / "tokenizer.json")
        if is_same and all(base.token_name(token.id) == token.content for token in stated):
            return base
        if not isinstance(base, JsonCodec):
            raise AdapterUnsupported("it ships a tokenizer of its own, and the base's is in tiktoken's format")
        text = base.as_json()
        self._own_bytes = len(text)
        changes = changed_parts(directory, text, self._num_rows)
        return JsonCodec(Tokenizer.from_str(json.dumps(json.loads(text) | changes))) if changes else base

    def _template(self, directory: Path, own: Mapping[str, Any]) -> Template | None:
        said = own.get("chat_template")
        is_named = isinstance(said, list) and all(isinstance(entry, dict) and "name" in entry for entry in said)
        if not (said is None or isinstance(said, str) or is_named):
            raise AdapterInvalid("tokenizer_config.json: chat_template is neither a text nor a list of named ones")
        base = self._base
        base_tokens = special_tokens(base.config)
        tokens = base_tokens | {name: text for name, text in special_tokens(own).items() if name in own}
        sources, base_sources = template_sources(directory, own), template_sources(base.directory, base.config)
        if sources and "default" not in sources:
            names = ", ".join(ascii(name)[1:-1] for name in sorted(sources))  # which terminals and logs will show
            raise AdapterUnsupported(f"none of its chat templates is the default: {names[:200]}")
        if not sources or sources == base_sources:
            if tokens == base_tokens or base.template is None:
                return base.template
            return ChatTemplate(base_sources, tokens)
        return BroughtTemplate(sources, tokens, self._processes)

    def _own_ends(self, codec: Codec, own: Mapping[str, Any]) -> frozenset[int]:
        text = special_tokens(own)["eos_token"]
        if not isinstance(text, str) or text == special_tokens(self._base.config)["eos_token"]:
            return frozenset()
        token_id = codec.token_id(text)
        if token_id is None:
            raise AdapterInvalid(f"its eos_token {ascii(text)[:80]} is no token of its vocabulary")
        return frozenset({token_id})


def _template_bytes(template: Template | None) -> int:
    if isinstance(template, BroughtTemplate):
        return sum(sys.getsizeof(source) for source in template._work.sources.values())
    return 0 if template is None else _COMPILED * sys.getsizeof(template.source)


def _are_same(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)
