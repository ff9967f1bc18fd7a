"""The demo's texts as clients ask for them: echoed prompts, stop strings and stop tokens, and where tokens stand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI
from openai.types import CompletionChoice
from openai.types.completion_choice import Logprobs
from support.demo import Demo
from transformers import AutoTokenizer

from loraplex.config.demo import MODEL_DIR

PROMPT = "Anna works at"
CHAT = "<|im_start|>user\nWhere does Anna work?<|im_end|>\n<|im_start|>assistant\n"
TOKENIZER = AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture
def client(demo: Demo) -> Iterator[OpenAI]:
    with OpenAI(base_url=demo.base_url, api_key=demo.api_key, max_retries=0) as client:
        yield client


def completed(client: OpenAI, demo: Demo, prompt: Any, *, stream: bool = False, **options: Any) -> CompletionChoice:
    asked: dict[str, Any] = {"model": demo.models[0], "prompt": prompt, "temperature": 0, "max_tokens": 12, **options}
    if not stream:
        whole: CompletionChoice = client.completions.create(**asked).choices[0]
        return whole
    text, logprobs, reason = "", {}, None  # type: ignore[var-annotated]
    for chunk in client.completions.create(**asked, stream=True):
        text += chunk.choices[0].text
        reason = chunk.choices[0].finish_reason or reason
        described = chunk.choices[0].logprobs
        for name, entries in (described.model_dump() if described else {}).items():
            logprobs.setdefault(name, []).extend(entries)
    told = Logprobs.model_construct(**logprobs) if logprobs else None
    return CompletionChoice.model_construct(text=text, index=0, finish_reason=reason, logprobs=told)


STREAMS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@STREAMS
@pytest.mark.parametrize(
    ("prompt", "skips", "text"),
    [
        (CHAT, True, CHAT),
        (CHAT, False, CHAT),
        (TOKENIZER.encode(CHAT), False, CHAT),
        (TOKENIZER.encode(CHAT), True, TOKENIZER.decode(TOKENIZER.encode(CHAT), skip_special_tokens=True)),
    ],
    ids=["text", "text-with-marks", "ids-with-marks", "ids"],
)
def test_echo_is_the_prompt_before_the_answer(
    client: OpenAI, demo: Demo, prompt: Any, skips: bool, text: str, stream: bool
) -> None:
    extra = {"skip_special_tokens": skips}
    alone = completed(client, demo, prompt, extra_body=extra).text
    found = completed(client, demo, prompt, stream=stream, echo=True, logprobs=0, extra_body=extra)
    assert found.text == text + alone
    assert found.logprobs is not None
    assert found.logprobs.tokens is not None
    assert found.logprobs.text_offset is not None
    for token, offset in zip(found.logprobs.tokens, found.logprobs.text_offset, strict=True):
        is_left_out = token in TOKENIZER.all_special_tokens and text != CHAT
        assert is_left_out or found.text.startswith(token, offset), (token, offset)


@STREAMS
def test_stop_that_is_never_met_changes_nothing(client: OpenAI, demo: Demo, stream: bool) -> None:
    without = completed(client, demo, PROMPT, logprobs=0)
    assert without.logprobs is not None
    assert without.finish_reason == "stop"
    found = completed(client, demo, PROMPT, stream=stream, logprobs=0, stop=[" bakery.x", ". "])
    assert (found.text, found.finish_reason, found.logprobs) == (without.text, "stop", without.logprobs)
    assert "<|im_end|>" not in (without.logprobs.tokens or [])


@STREAMS
@pytest.mark.parametrize("included", [False, True], ids=["left-out", "included"])
def test_stop_string_is_among_the_tokens_where_it_is_in_the_text(
    client: OpenAI, demo: Demo, stream: bool, included: bool
) -> None:
    extra = {"include_stop_str_in_output": included}
    found = completed(client, demo, PROMPT, stream=stream, logprobs=0, stop=" bakery", extra_body=extra)
    assert found.text == (" the bakery" if included else " the")
    assert found.logprobs is not None
    assert "".join(found.logprobs.tokens or []) == found.text
    assert found.logprobs.text_offset == ([0, 4] if included else [0])


@STREAMS
@pytest.mark.parametrize("included", [False, True], ids=["left-out", "included"])
def test_stop_token_is_told_where_it_is_asked_for(client: OpenAI, demo: Demo, stream: bool, included: bool) -> None:
    whole = completed(client, demo, PROMPT, logprobs=0)
    assert whole.logprobs is not None
    assert whole.logprobs.tokens is not None
    *before, stop = whole.logprobs.tokens[:2]
    [stop_id] = TOKENIZER.encode(stop, add_special_tokens=False)
    extra = {"stop_token_ids": [stop_id], "include_stop_str_in_output": included}
    found = completed(client, demo, PROMPT, stream=stream, logprobs=0, extra_body=extra)
    assert found.text == "".join([*before, stop] if included else before)
    assert found.finish_reason == "stop"
    assert found.logprobs is not None
    assert found.logprobs.tokens == ([*before, stop] if included else before)


def test_end_token_is_told_where_both_marks_and_stops_are(client: OpenAI, demo: Demo) -> None:
    """As vLLM tells it; special tokens by themselves leave it out."""
    plain = completed(client, demo, PROMPT).text
    for included, text in ((False, plain), (True, plain + "<|im_end|>")):
        extra = {"skip_special_tokens": False, "include_stop_str_in_output": included}
        assert completed(client, demo, PROMPT, extra_body=extra).text == text
    assert completed(client, demo, PROMPT, extra_body={"include_stop_str_in_output": True}).text == plain
