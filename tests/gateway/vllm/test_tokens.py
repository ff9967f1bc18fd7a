"""vLLM's /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

import pytest
from support.gateway import BASE, Gateway
from support.problems import assert_problem

CHAT = [{"role": "user", "content": "hé"}]


def post(gateway: Gateway, path: str, body: Any) -> Any:
    with gateway.client() as client:
        return client.post(path, json=body)


@pytest.mark.parametrize("model", [None, BASE, "team/echo-one"])
@pytest.mark.parametrize("names", [None, False, True])
def test_text_becomes_tokens(gateway: Gateway, model: str | None, names: bool | None) -> None:
    told = post(gateway, "/tokenize", {"model": model, "prompt": "hé", "return_token_strs": names}).json()
    expected = ["h", "\xc3", "\xa9"] if names else None
    assert told == {"count": 3, "max_model_len": 512, "tokens": [104, 195, 169], "token_strs": expected}


def test_chat_becomes_the_tokens_of_its_completion(gateway: Gateway) -> None:
    messages = [{"role": "system", "content": "Be kind."}, *CHAT]
    told = post(gateway, "/tokenize", {"model": BASE, "messages": messages, "add_special_tokens": False}).json()
    answer = post(gateway, "/v1/chat/completions", {"model": BASE, "messages": messages}).json()
    assert told["count"] == len(told["tokens"]) == answer["usage"]["prompt_tokens"]
    assert bytes(told["tokens"]).decode() == "Be kind.\nhé"


def test_tokens_become_text_again(gateway: Gateway) -> None:
    assert post(gateway, "/detokenize", {"model": BASE, "tokens": [104, 195, 169]}).json() == {"prompt": "hé"}
    assert post(gateway, "/detokenize", {"tokens": [104, 256]}).json() == {"prompt": "h<eos>"}
    assert post(gateway, "/detokenize", {"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "prompt", "invalid_request"),
        ({"prompt": "a", "messages": CHAT}, "prompt", "invalid_request"),
        ({"prompt": ["a"]}, "prompt", "invalid_request"),
        ({"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt", "unknown_parameter"),
        ({"messages": []}, "messages", "invalid_request"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_request"),
        ({"messages": CHAT, "add_special_tokens": True}, "add_special_tokens", "unsupported_parameter"),
        ({"messages": CHAT, "chat_template": "x"}, "chat_template", "unsupported_parameter"),
        ({"messages": CHAT, "mm_processor_kwargs": {"a": 1}}, "mm_processor_kwargs", "unsupported_parameter"),
        ({"messages": CHAT, "chat_template_kwargs": {"x": 1}}, "chat_template_kwargs.x", "unsupported_parameter"),
        (
            {"messages": CHAT, "continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            "invalid_request",
        ),
    ],
    ids=str,
)
def test_tokenize_refuses_by_name(gateway: Gateway, body: Any, param: str, code: str) -> None:
    assert_problem(post(gateway, "/tokenize", body), 400, code, param)


@pytest.mark.parametrize("tokens", [[-1], [257], [10**30]])
def test_token_that_is_none_is_400(gateway: Gateway, tokens: list[int]) -> None:
    assert_problem(post(gateway, "/detokenize", {"tokens": tokens}), 400, "invalid_request", "tokens")


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})])
def test_model_unknown_is_404(gateway: Gateway, path: str, body: dict[str, Any]) -> None:
    assert_problem(post(gateway, path, {**body, "model": "none"}), 404, "model_not_found", "model")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_body_that_cannot_be_read_is_400(gateway: Gateway, content: bytes) -> None:
    with gateway.client() as client:
        for path in ("/tokenize", "/detokenize"):
            assert_problem(client.post(path, content=content), 400, "invalid_request")
