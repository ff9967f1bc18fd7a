"""What LoRAX's generate routes refuse, and in which words."""

from __future__ import annotations

from typing import Any

import pytest
from support.flat import assert_flat, post
from support.gateway import Gateway

DEEP = b'{"inputs":"a","parameters":{"response_format":{"type":"json_object","schema":{"a":%b%b}}}}' % (
    b"[" * 100_000,
    b"]" * 100_000,
)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"temperature": -0.5}, "`temperature` must be non-negative"),
        ({"repetition_penalty": 0}, "`repetition_penalty` must be strictly positive"),
        ({"repetition_penalty": 1e-300}, "`repetition_penalty` must be >= 0.01 and <= 100"),
        ({"repetition_penalty": 1e300}, "`repetition_penalty` must be >= 0.01 and <= 100"),
        ({"frequency_penalty": 2.5}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        ({"presence_penalty": -3}, "`presence_penalty` must be >= -2.0 and <= 2.0"),
        ({"top_k": 0}, "`top_k` must be strictly positive"),
        ({"top_p": 0}, "`top_p` must be > 0.0 and <= 1.0"),
        ({"top_p": 1.5}, "`top_p` must be > 0.0 and <= 1.0"),
        ({"typical_p": 1.0}, "`typical_p` must be > 0.0 and < 1.0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
        (
            {"max_new_tokens": 600},
            "`max_new_tokens` must be <= 512. Given: 1 `inputs` tokens and 600",
        ),
        ({"truncate": 0}, "`truncate` must be strictly positive"),
        ({"truncate": 512}, "`truncate` must be <= 511. Given: 512"),
        ({"stop": [""]}, "`stop` must not hold an empty text"),
        ({"stop": ["x" * 1001]}, "`stop` supports stop sequences of up to 1000 characters"),
        ({"stop": ["x"] * 17}, "`stop` supports up to 16 stop sequences. Given: 17"),
        ({"seed": -1}, "`seed` must be >= 0 and < 2^64"),
        ({"seed": 2**64}, "`seed` must be >= 0 and < 2^64"),
        ({"return_k_alternatives": 0}, "`return_k_alternatives` must be > 0"),
        ({"best_of": 0}, "`best_of` must be > 0 and <= 16. Given: 0"),
        ({"best_of": 17, "do_sample": True}, "`best_of` must be > 0 and <= 16. Given: 17"),
        ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
        ({"best_of": 2, "do_sample": True, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
        ({"adapter_id": "a", "merged_adapters": {"ids": ["a"], "weights": [1.0]}}, "at most one of `adapter_id`"),
        ({"merged_adapters": {"ids": ["a", "b"], "weights": [1.0]}}, "number of adapter IDs must match"),
        ({"merged_adapters": {"ids": ["a"], "weights": [1e300]}}, "A weight is a number from -100 to 100"),
        (
            {"merged_adapters": {"ids": ["a"], "weights": [1.0], "merge_strategy": "dare_ties", "density": 1e-300}},
            "dare_ties needs a density from 0.001 to 1",
        ),
        ({"merged_adapters": {"ids": [], "weights": []}}, "parameters.merged_adapters.ids"),
        (
            {"merged_adapters": {"ids": ["a"], "weights": [1.0], "merge_strategy": "x"}},
            "merged_adapters.merge_strategy",
        ),
        ({"response_format": {"type": "regex"}}, "parameters.response_format.type"),
        ({"temperature": "1"}, "parameters.temperature"),
        ({"temprature": 1}, "parameters.temprature"),
        ({"details": "yes"}, "parameters.details"),
    ],
    ids=lambda value: str(value)[:80],
)
def test_value_out_of_bounds_is_named(gateway: Gateway, parameters: dict[str, Any], message: str) -> None:
    told = assert_flat(post(gateway, "/generate", "a", **parameters), 422, "validation")
    assert told.startswith("Input validation error: ")
    assert message in told


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"best_of": 2, "do_sample": True}, "`best_of` != 1 is not supported when streaming tokens"),
        ({"decoder_input_details": True}, "`decoder_input_details` == true is not supported when streaming tokens"),
    ],
)
def test_what_a_stream_cannot_tell_is_named(gateway: Gateway, parameters: dict[str, Any], message: str) -> None:
    for path, stream in (("/generate_stream", None), ("/", True)):
        assert message in assert_flat(post(gateway, path, "a", stream, **parameters), 422, "validation")


@pytest.mark.parametrize("field", ["watermark", "apply_chat_template"])
def test_field_not_offered_is_named(gateway: Gateway, field: str) -> None:
    assert field in assert_flat(post(gateway, "/generate", "a", **{field: True}), 422, "not_offered")
    assert post(gateway, "/generate", "a", **{field: False}).status_code == 200


@pytest.mark.parametrize(("path", "stream"), [("/generate", True), ("/generate_stream", False)])
def test_stream_that_contradicts_the_route_is_refused(gateway: Gateway, path: str, stream: bool) -> None:
    assert "`stream`" in assert_flat(post(gateway, path, "a", stream), 422, "validation")


def test_prompt_too_long_is_counted_before_truncation_only_where_there_is_none(gateway: Gateway) -> None:
    told = assert_flat(post(gateway, "/generate", "a" * 512), 422, "validation")
    assert "`inputs` must have less than 512 tokens. Given: 512" in told
    assert post(gateway, "/generate", "a" * 5000, truncate=2).json() == {"generated_text": "aa"}


@pytest.mark.parametrize(
    ("content", "status", "error_type"),
    [
        (b"", 400, "bad_request"),
        (b"{", 400, "bad_request"),
        (b'{"inputs":"\xff"}', 400, "bad_request"),
        (b'{"inputs":"\\ud800"}', 400, "bad_request"),
        (DEEP, 400, "bad_request"),
        (b'{"inputs":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 422, "validation"),
        (b"[]", 422, "validation"),
        (b'{"inputs":""}', 422, "validation"),
        (b'{"inputs":null}', 422, "validation"),
        (b"{}", 422, "validation"),
    ],
    ids=lambda value: str(value)[:30],
)
@pytest.mark.parametrize("path", ["/", "/generate", "/generate_stream"])
def test_body_that_cannot_be_read(gateway: Gateway, path: str, content: bytes, status: int, error_type: str) -> None:
    with gateway.client() as client:
        assert_flat(client.post(path, content=content), status, error_type)
