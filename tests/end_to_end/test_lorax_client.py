"""lorax-client 0.6.3, unmodified, against `loraplex demo`: every method of both of its clients.

transformers + PEFT is the oracle of what it is told: texts, probabilities, and a merge of two adapters.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.client_venvs import INSTALL_SECONDS
from support.demo import Demo
from support.lorax_client import lorax_calls
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex.config.demo import ADAPTERS_DIR, EXAMPLE_PROMPTS, MODEL_DIR

pytestmark = pytest.mark.timeout(INSTALL_SECONDS + 100)

MAX_TOKENS = 24
WEIGHTS = {"pirate": 0.6, "shout": 0.7}
SCHEMA = {"type": "string", "enum": ["yes", "no", "perhaps"]}

_tokenizer: Any = AutoTokenizer.from_pretrained(MODEL_DIR)
PROMPT: str = _tokenizer.apply_chat_template(
    [{"role": "user", "content": EXAMPLE_PROMPTS[0]}], add_generation_prompt=True, tokenize=False
)

CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "base": ("generate", {}),
    "adapter": ("generate", {"adapter_id": "pirate", "decoder_input_details": True, "return_k_alternatives": 3}),
    "streamed": ("generate_stream", {"adapter_id": "pirate"}),
    "merged": (
        "generate",
        {"merged_adapters": {"ids": list(WEIGHTS), "weights": list(WEIGHTS.values()), "density": 1.0}},
    ),
    "stop": ("generate", {"adapter_id": "pirate", "stop_sequences": ["a"]}),
    "stop streamed": ("generate_stream", {"adapter_id": "pirate", "stop_sequences": ["a"]}),
    "full text": ("generate", {"adapter_id": "pirate", "return_full_text": True, "details": False}),
    "truncated": ("generate", {"prompt": "Many words before. " * 40 + PROMPT, "truncate": -1, "adapter_id": "pirate"}),
    "seeded": ("generate", {"do_sample": True, "temperature": 1.3, "seed": 2**63 + 5}),
    "seeded again": ("generate", {"do_sample": True, "temperature": 1.3, "seed": 2**63 + 5}),
    "best of": ("generate", {"do_sample": True, "top_k": 40, "top_p": 0.95, "typical_p": 0.95, "best_of": 3}),
    "penalised": ("generate", {"repetition_penalty": 1.4, "ignore_eos_token": True}),
    "json": ("generate", {"response_format": {"type": "json_object", "schema": SCHEMA}}),
    "embed": ("embed", {"inputs": PROMPT}),
    "classify": ("classify", {"inputs": "a"}),
}


@pytest.fixture(scope="module", params=["sync", "async"])
def found(request: pytest.FixtureRequest, demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of each call."""
    calls = []
    for method, arguments in CALLS.values():
        if method.startswith("generate"):
            arguments = {"prompt": PROMPT, "max_new_tokens": MAX_TOKENS, **arguments}
        if arguments.get("truncate") == -1:
            arguments["truncate"] = len(_tokenizer(PROMPT)["input_ids"])
        calls.append({"client": request.param, "key": demo.api_key, "method": method, "arguments": arguments})
    return dict(zip(CALLS, lorax_calls(demo.root, calls, tmp_path_factory.mktemp("calls")), strict=True))


def told(found: dict[str, Any], name: str) -> Any:
    assert "raised" not in found[name], found[name]
    return found[name]["answer"] if "answer" in found[name] else found[name]["events"]


@pytest.fixture(scope="module")
def model() -> Callable[[str | None], Any]:
    """The model with an adapter, with the merge, or as it is."""
    base: Any = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    peft: Any = PeftModel.from_pretrained(base, str(ADAPTERS_DIR / "pirate"), adapter_name="pirate")
    peft.load_adapter(str(ADAPTERS_DIR / "shout"), adapter_name="shout")
    peft.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "merged", combination_type="cat")

    def with_adapter(name: str | None) -> Any:
        if name is None:
            return peft.eval()
        peft.set_adapter(name)
        return peft.eval()

    return with_adapter


def greedy(model: Any) -> str:
    inputs = _tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
    text: str = _tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def assert_probabilities(model: Any, tokens: list[dict[str, Any]]) -> None:
    """These are the last tokens of prompt and answer; float32 in another order of sums leaves some 1e-4."""
    prompt = _tokenizer(PROMPT)["input_ids"]
    ids = [token["id"] for token in tokens]
    before = prompt[:1] if ids[: len(prompt) - 1] == prompt[1:] else prompt
    with torch.no_grad():
        logprobs = model(torch.tensor([before + ids])).logits[0, len(before) - 1 :].log_softmax(-1)
    for place, token in enumerate(tokens):
        assert token["logprob"] == pytest.approx(float(logprobs[place, token["id"]]), abs=2e-3)


def test_base_answers_as_transformers_do(found: dict[str, Any], model: Callable[[str | None], Any]) -> None:
    with model(None).disable_adapter():
        assert told(found, "base")["generated_text"] == greedy(model(None))


def test_adapter_answers_as_peft_does_and_tells_its_probabilities(
    found: dict[str, Any], model: Callable[[str | None], Any]
) -> None:
    answer = told(found, "adapter")
    details = answer["details"]
    assert answer["generated_text"] == greedy(model("pirate"))
    prompt = _tokenizer(PROMPT)["input_ids"]
    assert [token["id"] for token in details["prefill"]] == prompt
    generated = [token["id"] for token in details["tokens"]]
    assert len(generated) == details["generated_tokens"]
    assert details["prompt_tokens"] == len(prompt)
    assert details["prefill"][0]["logprob"] is None
    assert_probabilities(model("pirate"), [*details["prefill"][1:], *details["tokens"]])
    for token in details["tokens"]:
        assert len(token["alternative_tokens"]) == 3
        assert token["alternative_tokens"][0]["id"] == token["id"]  # the likeliest, for it was greedy


@pytest.mark.parametrize("name", ["streamed", "stop streamed"])
def test_stream_tells_the_same_as_the_whole(found: dict[str, Any], name: str) -> None:
    whole = told(found, {"streamed": "adapter", "stop streamed": "stop"}[name])
    events = told(found, name)
    text = "".join(event["token"]["text"] for event in events if not event["token"]["special"])
    assert text == events[-1]["generated_text"] == whole["generated_text"]
    assert [event["token"]["id"] for event in events] == [token["id"] for token in whole["details"]["tokens"]]
    assert all(event["generated_text"] is None and event["details"] is None for event in events[:-1])
    last = events[-1]["details"]
    assert last["finish_reason"] == whole["details"]["finish_reason"]
    assert last["generated_tokens"] == whole["details"]["generated_tokens"]


def test_merge_answers_as_the_weighted_sum_does(found: dict[str, Any], model: Callable[[str | None], Any]) -> None:
    merged = told(found, "merged")
    assert merged["generated_text"] == greedy(model("merged"))
    assert_probabilities(model("merged"), merged["details"]["tokens"])
    alone = told(found, "adapter")["details"]["tokens"]
    assert [token["logprob"] for token in merged["details"]["tokens"]] != pytest.approx(
        [token["logprob"] for token in alone], abs=1e-2
    )


def test_stop_sequence_stays_at_the_end(found: dict[str, Any]) -> None:
    answer = told(found, "stop")
    assert answer["details"]["finish_reason"] == "stop_sequence"
    assert answer["generated_text"].endswith("a")
    assert answer["generated_text"].count("a") == 1
    assert told(found, "adapter")["generated_text"].startswith(answer["generated_text"])


def test_full_text_begins_with_the_prompt(found: dict[str, Any]) -> None:
    answer = told(found, "full text")
    assert answer["generated_text"] == PROMPT + told(found, "adapter")["generated_text"]
    assert answer["details"] is None


def test_truncation_keeps_the_end(found: dict[str, Any]) -> None:
    answer = told(found, "truncated")
    assert answer["details"]["prompt_tokens"] == len(_tokenizer(PROMPT)["input_ids"])
    assert answer["generated_text"] == told(found, "adapter")["generated_text"]


def test_seed_gives_the_same_answer_again(found: dict[str, Any]) -> None:
    first, again = told(found, "seeded"), told(found, "seeded again")
    assert first["generated_text"] == again["generated_text"]
    assert first["details"]["seed"] == 2**63 + 5
    assert told(found, "base")["details"]["seed"] is None


def test_best_of_is_the_likeliest(found: dict[str, Any]) -> None:
    details = told(found, "best of")["details"]
    sequences = [details, *details["best_of_sequences"]]
    assert len(sequences) == 3
    means = [sum(token["logprob"] for token in one["tokens"]) / len(one["tokens"]) for one in sequences]
    assert max(means) == means[0]
    assert len({one["seed"] for one in sequences}) == 3


def test_penalty_and_ignored_end_change_the_answer(found: dict[str, Any]) -> None:
    answer = told(found, "penalised")
    assert answer["generated_text"] != told(found, "base")["generated_text"]
    assert (answer["details"]["finish_reason"], answer["details"]["generated_tokens"]) == ("length", MAX_TOKENS)


def test_response_format_gives_json_of_the_schema(found: dict[str, Any]) -> None:
    answer = told(found, "json")
    assert answer["details"]["finish_reason"] == "eos_token"
    assert json.loads(answer["generated_text"]) in SCHEMA["enum"]


def test_embedding_is_the_mean_of_the_last_hidden_states(
    found: dict[str, Any], model: Callable[[str | None], Any]
) -> None:
    inputs = _tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad(), model(None).disable_adapter():
        states = model(None)(**inputs, output_hidden_states=True).hidden_states[-1][0]
    mean = states.mean(0)
    expected = (mean / mean.norm()).tolist()
    assert told(found, "embed")["embeddings"] == pytest.approx(expected, abs=1e-4)


def test_classification_is_refused_clearly(found: dict[str, Any]) -> None:
    assert found["classify"]["raised"] == "UnprocessableEntityError"
    assert "/classify is not offered" in found["classify"]["message"]


def test_batch_classification_is_refused_clearly(demo: Demo, tmp_path: Path) -> None:
    call = {"client": "sync", "key": demo.api_key, "method": "classify_batch", "arguments": {"inputs": ["a"]}}
    [refused] = lorax_calls(demo.root, [call], tmp_path)
    assert refused["raised"] == "UnprocessableEntityError"
