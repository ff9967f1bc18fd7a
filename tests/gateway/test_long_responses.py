"""/v1/responses behind long conversations: looked through in a thread, and no more of them than the context holds."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from support.gateway import BASE, Gateway
from support.problems import assert_problem

TURN = 20  # tokens a turn here, with what joins it to the next


def turns(count: int) -> list[dict[str, str]]:
    """Of a user's message and an answer each, told apart by their first three characters; the last has no answer."""
    said = [
        [
            {"role": "user", "content": f"{number:03}" + "q" * (TURN - 12)},
            {"role": "assistant", "content": "a" * 7},
        ]
        for number in range(count)
    ]
    return [message for turn in said for message in turn][:-1]


@pytest.fixture
def renderings(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """Of each: whether a thread of long work made it, and of how many messages."""
    found: list[tuple[bool, int]] = []
    encode_chat = gateway.services.engine.tokenizer.encode_chat

    def seen(messages: Any, **options: Any) -> list[int]:
        found.append((threading.current_thread().name.startswith("long-work"), len(messages)))
        return encode_chat(messages, **options)

    monkeypatch.setattr(gateway.services.engine.tokenizer, "encode_chat", seen)
    return found


@pytest.mark.parametrize("count", [26, 27, 40, 100, 256])
def test_truncation_looks_in_one_thread_how_much_fits(
    gateway: Gateway, renderings: list[tuple[bool, int]], count: int
) -> None:
    with gateway.client() as client:
        asked = {"model": BASE, "input": turns(count), "truncation": "auto", "max_output_tokens": 1, "store": False}
        answer = client.post("/v1/responses", json=asked)
    assert answer.status_code == 200, answer.text
    kept = min(count, (512 - 1 + 9) // TURN)  # the last turn has no answer
    assert answer.json()["usage"]["input_tokens"] == kept * TURN - 9
    assert {is_apart for is_apart, _ in renderings} == {True}
    whole, *trials = [num_messages for _, num_messages in renderings]
    assert whole == 2 * count - 1
    assert all(num_messages < 4 * kept for num_messages in trials)


def test_truncation_of_a_short_conversation_tries_the_whole_in_the_loop_alone(
    gateway: Gateway, renderings: list[tuple[bool, int]]
) -> None:
    long = [{"role": "user", "content": "x" * 200}] * 9
    with gateway.client() as client:
        answer = client.post("/v1/responses", json={"model": BASE, "input": long, "truncation": "auto"})
        assert answer.json()["usage"]["input_tokens"] == 401
        assert [is_apart for is_apart, _ in renderings] == [False, *[True] * (len(renderings) - 1)]
        assert len(renderings) > 2
        renderings.clear()
        client.post("/v1/responses", json={"model": BASE, "input": long[:2], "truncation": "auto"})
        assert renderings == [(False, 2)]


def test_last_turn_that_is_too_long_is_an_error_however_long_the_conversation(gateway: Gateway) -> None:
    with gateway.client() as client:
        asked: dict[str, object] = {
            "model": BASE,
            "input": [*turns(60), {"role": "user", "content": "z" * 600}],
            "truncation": "auto",
        }
        assert_problem(client.post("/v1/responses", json=asked), 400, "context_length_exceeded", "input")
        asked = {"model": BASE, "input": turns(60), "truncation": "auto", "max_output_tokens": 512}
        assert_problem(client.post("/v1/responses", json=asked), 400, "context_length_exceeded", "max_output_tokens")
