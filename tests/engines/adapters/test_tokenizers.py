"""Tokenizers and chat templates that adapters ship: as transformers reads the same files, or refused by name."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from support.models import make_tokenizer
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from loraplex.engines.adapters import tokenizers as module
from loraplex.engines.adapters.tokenizers import AdapterTokenizers
from loraplex.engines.errors import AdapterError, AdapterInvalid, AdapterMismatch, AdapterUnsupported, InvalidRequest
from loraplex.engines.protocol import Adapter
from loraplex.engines.template_process import Rendered, TemplateProcesses, Work
from loraplex.engines.tokenizer import HubTokenizer
from loraplex.engines.tokenizer_protocol import ChatMessage

NUM_ROWS = 320  # of the model's embeddings; the base's tokenizer names 262
NUM_NAMED = 262
OWN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role | upper }}] {{ m.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[ASSISTANT]{% if mood is defined %}({{ mood }}){% endif %}{% endif %}"
)
TALK = [ChatMessage(role="system", content="Be kind. "), ChatMessage(role="user", content="Żółw? 🐢")]
THEIRS = [{"role": message.role, "content": message.content} for message in TALK]


@pytest.fixture
def base(tmp_path: Path) -> HubTokenizer:
    make_tokenizer().save_pretrained(tmp_path / "base")
    return HubTokenizer(tmp_path / "base")


@pytest_asyncio.fixture
async def tokenizers(base: HubTokenizer) -> AsyncIterator[AdapterTokenizers]:
    found = AdapterTokenizers(base, NUM_ROWS)
    yield found
    await found.close()


def shipped(directory: Path, tokenizer: PreTrainedTokenizerFast | None = None, **files: object) -> Adapter:
    """An adapter's directory with what a tokenizer saves there, and further files; `__` stands for a dot."""
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name.replace("__", ".")).write_text(text)
    return Adapter(id=f"sha-{directory.name}", name=directory.name, path=str(directory))


def extended() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<tool>", "Schildkröte"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = OWN_TEMPLATE + "<|turn|>"
    return tokenizer


def theirs(adapter: Adapter) -> Any:
    return AutoTokenizer.from_pretrained(adapter.path)


async def test_shipped_template_renders_as_transformers_renders_it(
    tokenizers: AdapterTokenizers, base: HubTokenizer, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = OWN_TEMPLATE
    adapter = shipped(tmp_path / "own", tokenizer)
    own = await tokenizers.of(adapter)
    expected = theirs(adapter).apply_chat_template(THEIRS, add_generation_prompt=True, mood="calm", return_dict=False)
    assert own.encode_chat(TALK, variables={"mood": "calm"}) == expected
    assert own.encode_chat(TALK) != base.encode_chat(TALK)
    assert own.template_variables == {"mood"}
    assert own.renders_apart
    assert own.codec is base.codec, "an unchanged vocabulary is held once"


async def test_what_is_shipped_as_the_base_has_it_is_the_bases(
    tokenizers: AdapterTokenizers, base: HubTokenizer, tmp_path: Path
) -> None:
    assert await tokenizers.of(shipped(tmp_path / "same", make_tokenizer())) is base
    assert await tokenizers.of(shipped(tmp_path / "nothing")) is base


@pytest.mark.parametrize("form", ["brought", "named", "compiled"])
async def test_what_is_held_of_templates_counts_as_large_as_it_is(
    tokenizers: AdapterTokenizers, base: HubTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    large = OWN_TEMPLATE + "{# " + "x" * 60_000 + " #}"
    monkeypatch.setattr(module, "_MAX_BYTES", 100_000)
    if form == "compiled":  # the base's, with tokens of the adapter's
        (base.directory / "chat_template.jinja").write_text(large)
    named = [{"name": "default", "template": OWN_TEMPLATE}, {"name": "tool_use", "template": large}]
    files: dict[str, dict[str, object]] = {
        "brought": {"chat_template__jinja": large},
        "named": {"tokenizer_config__json": {"chat_template": named}},
        "compiled": {"tokenizer_config__json": {"bos_token": "<|user|>"}},
    }
    first, second = (shipped(tmp_path / name, None, **files[form]) for name in ("first", "second"))
    held = await tokenizers.of(first)
    assert await tokenizers.of(first) is held
    await tokenizers.of(second)
    assert await tokenizers.of(first) is not held


@pytest.mark.parametrize("form", ["tokenizer.json", "added_tokens.json", "tokenizer_config.json"])
async def test_added_tokens_are_encoded_and_decoded_as_transformers_does(
    tokenizers: AdapterTokenizers, tmp_path: Path, form: str
) -> None:
    adapter = shipped(tmp_path / "more", extended())
    oracle = theirs(adapter)
    if form != "tokenizer.json":
        told = _as_old_files_say(Path(adapter.path), form)
        shutil.rmtree(adapter.path)
        adapter = shipped(tmp_path / "more", None, chat_template__jinja=oracle.chat_template, **told)
    own = await tokenizers.of(adapter)
    text = "a <tool>turtle<|turn|> ist eine Schildkröte, keine Schildkrote"
    expected = oracle.encode(text, add_special_tokens=False)
    assert {NUM_NAMED, NUM_NAMED + 1, NUM_NAMED + 2} <= set(expected)
    assert own.encode(text, add_special_tokens=False) == expected
    for skips in (True, False):
        assert own.decode(expected, skip_special_tokens=skips) == oracle.decode(expected, skip_special_tokens=skips)
    stream = own.stream()
    assert "".join([*(stream.feed(token) for token in expected), stream.flush()]) == own.decode(expected)
    assert own.encode_chat(TALK) == oracle.apply_chat_template(THEIRS, add_generation_prompt=True, return_dict=False)


def _as_old_files_say(directory: Path, form: str) -> dict[str, Any]:
    whole = json.loads((directory / "tokenizer.json").read_text())
    new = [token for token in whole["added_tokens"] if token["id"] >= NUM_NAMED]
    special = {"additional_special_tokens": ["<|turn|>"]}
    if form == "added_tokens.json":
        return {"added_tokens__json": {t["content"]: t["id"] for t in new}, "tokenizer_config__json": special}
    return {"tokenizer_config__json": {"added_tokens_decoder": {str(token.pop("id")): token for token in new}}}


async def test_own_end_of_sequence_token_ends_answers(tokenizers: AdapterTokenizers, tmp_path: Path) -> None:
    own = await tokenizers.of(shipped(tmp_path / "ends", None, tokenizer_config__json={"eos_token": "<|user|>"}))
    assert own.own_ends == {259}
    assert own.encode_chat(TALK) == (await tokenizers.of(shipped(tmp_path / "none"))).encode_chat(TALK)


def _exchanged() -> PreTrainedTokenizerFast:
    """Two tokens have each other's ids."""
    whole = json.loads(make_tokenizer().backend_tokenizer.to_str())
    end, user = whole["added_tokens"][1], whole["added_tokens"][3]
    end["content"], user["content"] = user["content"], end["content"]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(whole)))  # type: ignore[no-untyped-call]


def _otherwise_split() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    return tokenizer


def _too_many() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<extra {number}>" for number in range(NUM_ROWS - NUM_NAMED + 1)])
    return tokenizer


def _around(*single: dict[str, Any], special: tuple[str, list[int]] | None = None) -> PreTrainedTokenizerFast:
    """With a post_processor that makes this of a text."""
    whole = json.loads(make_tokenizer().backend_tokenizer.to_str())
    known = {special[0]: {"id": special[0], "ids": special[1], "tokens": ["x"] * len(special[1])}} if special else {}
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    whole["post_processor"] = {
        "type": "TemplateProcessing", "single": [*single], "pair": pair, "special_tokens": known,
    }  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(whole)))  # type: ignore[no-untyped-call]


_A, _B = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
_MANY = {"SpecialToken": {"id": "<x>", "type_id": 0}}


REFUSED: dict[str, tuple[PreTrainedTokenizerFast | None, dict[str, object], type[AdapterError], str]] = {
    "ids of the base for other tokens": (
        _exchanged(), {}, AdapterMismatch, r"has '<\|user\|>' as the token 257, the base's as 259",
    ),
    "no row for a token": (_too_many(), {}, AdapterMismatch, "adds '<extra 58>' as the token 320, for which the model"),
    "no row, by the old file": (
        None, {"added_tokens__json": {"[PAD]": 320}}, AdapterMismatch, r"adds '\[PAD\]' as the token 320",
    ),
    "an id that leaves others out": (
        None, {"added_tokens__json": {"<x>": 300}}, AdapterUnsupported, "'<x>' as the token 300, which leaves ids out",
    ),
    "texts split otherwise": (_otherwise_split(), {}, AdapterUnsupported, "has another pre_tokenizer than the base's"),
    "a text that is not there": (_around(_B), {}, AdapterUnsupported, "a post_processor that takes no text alone"),
    "a text twice": (_around(_A, _A), {}, AdapterUnsupported, "does more than put 64 tokens around a text"),
    "many tokens around a text": (
        _around(_A, *[_MANY] * 40, special=("<x>", [258] * 50)), {}, AdapterUnsupported, "more than put 64 tokens",
    ),
    "no JSON": (None, {"tokenizer_config__json": "{"}, AdapterInvalid, "tokenizer_config.json cannot be read"),
    "no object": (None, {"tokenizer_config__json": "[]"}, AdapterInvalid, "is not a JSON object"),
    "no tokenizer": (None, {"tokenizer__json": "{}"}, AdapterInvalid, "its tokenizer files cannot be read"),
    "added tokens without texts": (
        None, {"tokenizer_config__json": {"added_tokens_decoder": {"262": {}}}}, AdapterInvalid, "added tokens cannot",
    ),
    "an id that is no number": (None, {"added_tokens__json": {"<x>": "y"}}, AdapterInvalid, "added tokens cannot be"),
    "an end that is no token": (
        None, {"tokenizer_config__json": {"eos_token": "<|fin|>"}}, AdapterInvalid, r"eos_token .<\|fin\|>. is no",
    ),
    "a template that is none": (None, {"chat_template__jinja": "{% for"}, AdapterInvalid, "template cannot be read"),
    "a template of another kind": (
        None, {"tokenizer_config__json": {"chat_template": 7}}, AdapterInvalid, "neither a text nor a list",
    ),
    "templates without a default": (
        None, {"tokenizer_config__json": {"chat_template": [{"name": "rag", "template": "x"}]}}, AdapterUnsupported,
        "none of its chat templates is the default: rag",
    ),
    "a name that would clear a terminal": (
        None, {"tokenizer_config__json": {"chat_template": [{"name": "\x1b[2J\n", "template": "x"}]}},
        AdapterUnsupported, r"is the default: \\x1b\[2J\\n$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
async def test_what_cannot_be_used_beside_the_base_is_refused_by_name(
    tokenizers: AdapterTokenizers, base: HubTokenizer, tmp_path: Path, case: str
) -> None:
    tokenizer, files, kind, message = REFUSED[case]
    before = base.encode_chat(TALK)
    with pytest.raises(kind, match=message):
        await tokenizers.of(shipped(tmp_path / "bad", tokenizer, **files))
    neighbour = await tokenizers.of(shipped(tmp_path / "good", None, chat_template__jinja="{{ messages[0].content }}"))
    assert neighbour.encode_chat(TALK) == base.encode("Be kind. ", add_special_tokens=False)
    assert base.encode_chat(TALK) == before


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "more than 2 s of computing",
        ),
        ("{{ messages[0].content * (10**9) }}", "MemoryError|was ended"),
    ],
    ids=["time", "memory"],
)
async def test_template_that_takes_too_much_is_ended_and_harms_no_neighbour(
    tokenizers: AdapterTokenizers, tmp_path: Path, template: str, says: str
) -> None:
    greedy = await tokenizers.of(shipped(tmp_path / "greedy", None, chat_template__jinja=template))
    fair = await tokenizers.of(shipped(tmp_path / "fair", None, chat_template__jinja=OWN_TEMPLATE))
    before = fair.encode_chat(TALK)
    for _ in range(2):  # one that was ended is not even tried the second time
        with pytest.raises(InvalidRequest, match=says):
            greedy.encode_chat(TALK)
    assert fair.encode_chat(TALK) == before


async def test_slow_template_keeps_up_no_quick_one(
    tokenizers: AdapterTokenizers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    laborious = "{% for i in range(99999) %}{% for j in range(20) %}{% endfor %}{% endfor %}done"
    slow = await tokenizers.of(shipped(tmp_path / "slow", None, chat_template__jinja=laborious))
    quick = await tokenizers.of(shipped(tmp_path / "quick", None, chat_template__jinja=OWN_TEMPLATE))
    ways: list[bool] = []
    ask = TemplateProcesses.ask

    def noted(processes: TemplateProcesses, work: Work, *, is_slow: bool) -> Rendered:
        ways.append(is_slow)
        return ask(processes, work, is_slow=is_slow)

    monkeypatch.setattr(TemplateProcesses, "ask", noted)
    for tokenizer in (quick, slow, quick, slow, quick):
        tokenizer.encode_chat(TALK)
    assert ways == [False, False, False, True, False]  # it is known once it was seen
    rendering = asyncio.create_task(asyncio.to_thread(slow.encode_chat, TALK))
    async with asyncio.timeout(10):
        while len(ways) < 6:
            await asyncio.sleep(0.001)
    quick.encode_chat(TALK)
    assert not rendering.done()
    await rendering


async def test_template_reaches_nothing_outside_its_sandbox(tokenizers: AdapterTokenizers, tmp_path: Path) -> None:
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    own = await tokenizers.of(shipped(tmp_path / "escape", None, chat_template__jinja=escape))
    with pytest.raises(InvalidRequest, match="'__class__' of 'list' object is unsafe"):
        own.encode_chat(TALK)
