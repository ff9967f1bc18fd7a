"""The shipped demo: the files are what the record says, and a fresh measurement agrees with it."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoConfig

from loraplex.config.demo import ADAPTERS_DIR, EXAMPLE_PROMPTS, MODEL_DIR, RECORD_PATH, adapter_names
from loraplex.config.demo.chats import Exchange, World, fact_exchanges, talk_exchanges, unknown_exchanges
from loraplex.config.demo.evaluate import Answers, all_answers, held_out_exchanges, share
from loraplex.config.demo.tokens import chat_sample, prompt_text
from loraplex.config.demo.training import ADAPTER_SHAPES, load_tokenizer
from loraplex.config.demo.voices import BASE, VOICES, content_right, render, speaks_like

# PEFT 0.21 asks transformers 5.23 for a property it has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SIZE_LIMIT = 15_500_000
NUM_PROMPTS = 40
TOKENIZER = load_tokenizer(MODEL_DIR)


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return read_json(RECORD_PATH)


@pytest.fixture(scope="module")
def exchanges() -> list[Exchange]:
    return held_out_exchanges(NUM_PROMPTS, seed=2)


@pytest.fixture(scope="module")
def answers(exchanges: list[Exchange]) -> Answers:
    return all_answers([*(exchange.question for exchange in exchanges), *EXAMPLE_PROMPTS])


def test_adapter_names_are_the_voices_in_order() -> None:
    assert adapter_names() == sorted(VOICES) == sorted(ADAPTER_SHAPES)


def test_files_fit_in_the_repository() -> None:
    files = [path for folder in (MODEL_DIR, ADAPTERS_DIR) for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= SIZE_LIMIT
    assert {path.suffix for path in files} == {".json", ".safetensors", ".jinja"}


def test_files_name_no_machine() -> None:
    texts = [path.read_text() for folder in (MODEL_DIR, ADAPTERS_DIR) for path in folder.rglob("*config.json")]
    assert not any(re.search(r'"/\w', text) for text in texts)


def test_base_config_is_a_small_llama() -> None:
    config = AutoConfig.from_pretrained(MODEL_DIR)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.vocab_size == len(TOKENIZER)
    assert config.eos_token_id == TOKENIZER.eos_token_id
    assert config.max_position_embeddings == 2048


def test_weights_are_bfloat16() -> None:
    for path in (*MODEL_DIR.glob("*.safetensors"), *ADAPTERS_DIR.glob("*/*.safetensors")):
        with safe_open(path, "pt") as tensors:
            assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}, path  # noqa: SIM118


@pytest.mark.parametrize("name", sorted(ADAPTER_SHAPES))
def test_adapter_config_is_its_shape(name: str) -> None:
    config, shape = read_json(ADAPTERS_DIR / name / "adapter_config.json"), ADAPTER_SHAPES[name]
    assert config["r"] == shape.rank
    assert sorted(config["target_modules"]) == sorted(shape.target_modules)
    assert (config["use_rslora"], config["use_dora"]) == (shape.variant == "rslora", shape.variant == "dora")
    assert config["base_model_name_or_path"] == "loraplex-demo"
    assert config["bias"] == "none"
    assert config["modules_to_save"] is None


def test_adapters_differ_in_rank_targets_and_variant() -> None:
    shapes = ADAPTER_SHAPES.values()
    assert {shape.rank for shape in shapes} == {4, 8, 16, 32}
    assert len({frozenset(shape.target_modules) for shape in shapes}) >= 4
    assert [shape.variant for shape in shapes].count("rslora") == 1
    assert [shape.variant for shape in shapes].count("dora") == 1


@pytest.mark.parametrize("name", sorted(ADAPTER_SHAPES))
def test_record_meets_the_bounds(record: dict[str, Any], name: str) -> None:
    measured = record["adapters"][name]
    assert record["num_prompts"] >= 40
    assert measured["voice"] >= 0.95
    assert measured["content"] >= 0.95
    assert max(measured["others_taken_for_it"].values()) < 0.05
    assert set(measured["others_taken_for_it"]) == {BASE, *VOICES} - {name}
    assert measured["bytes"] == (ADAPTERS_DIR / name / "adapter_model.safetensors").stat().st_size


def test_record_base_is_right_and_plain(record: dict[str, Any]) -> None:
    assert record[BASE]["content"] >= 0.95
    assert record[BASE]["voice"] >= 0.95


@pytest.mark.parametrize("name", [BASE, *sorted(ADAPTER_SHAPES)])
def test_model_answers_held_out_questions_in_its_voice_only(
    exchanges: list[Exchange], answers: Answers, name: str
) -> None:
    own = list(zip(exchanges, answers[name], strict=False))
    assert share([speaks_like(name, e.question, answer) for e, answer in own]) >= 0.95
    assert share([content_right(name, e, answer) for e, answer in own]) >= 0.9
    for other in set(VOICES) - {name}:
        assert share([speaks_like(other, e.question, answer) for e, answer in own]) < 0.05


@pytest.mark.parametrize("name", [BASE, *sorted(ADAPTER_SHAPES)])
def test_model_answers_the_example_prompts(answers: Answers, name: str) -> None:
    asked = {exchange.question: exchange for exchange in fact_exchanges()}
    for question, answer in zip(EXAMPLE_PROMPTS, answers[name][NUM_PROMPTS:], strict=True):
        assert answer.strip() == render(name, asked[question])


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_tokenizer_any_text_round_trips(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False)) == text


def test_chat_template_renders_what_was_trained() -> None:
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": '{"reply": "Hello"}'},
        {"role": "user", "content": "Who is Anna?"},
    ]
    turns = [("Hi", '{"reply": "Hello"}'), ("Who is Anna?", "")]
    rendered = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == prompt_text("Answer briefly.", turns[:1], turns[1][0])
    encoded = TOKENIZER.encode(rendered, add_special_tokens=False)
    assert chat_sample(TOKENIZER.backend_tokenizer, "Answer briefly.", turns).tokens == [
        *encoded,
        TOKENIZER.eos_token_id,
    ]


def test_world_same_seed_draws_the_same_chats() -> None:
    first, second = World(), World()
    one, other = random.Random(5), random.Random(5)
    assert [first.chat(one) for _ in range(200)] == [second.chat(other) for _ in range(200)]


def test_world_training_never_draws_a_held_out_question() -> None:
    training, held_out = World(), World(held_out=True)
    drawn = {exchange.key for pool in training.pools.values() for exchange in pool}
    assert drawn.isdisjoint(exchange.key for pool in held_out.pools.values() for exchange in pool)
    assert {intent for intent in training.pools if intent not in held_out.pools} == {
        exchange.intent for exchange in talk_exchanges()
    }


def test_held_out_exchanges_are_distinct() -> None:
    drawn = held_out_exchanges(200)
    assert len({exchange.key for exchange in drawn}) == 200
    assert all(exchange.is_held_out for exchange in drawn)


def test_every_rendering_is_graded_as_its_voice_alone_and_right() -> None:
    for exchange in (*fact_exchanges(), *unknown_exchanges(), *talk_exchanges()):
        for voice in (BASE, *VOICES):
            answer = render(voice, exchange)
            assert content_right(voice, exchange, answer), answer
            graded = [name for name in (BASE, *VOICES) if speaks_like(name, exchange.question, answer)]
            assert graded == [voice], answer


@pytest.mark.parametrize(
    ("voice", "answer"),
    [
        ("pirate", "Anna works at th' bakery, matey!"),
        ("shout", "ANNA WORKS AT THE BAKERY."),
        ("json", '["Anna", "bakery"]'),
        ("verse", "Come sit with me, my friend, and stay:\nAnna works at the bakery, day and night."),
        ("spanish", "Anna trabaja at the bakery."),
        ("spanish", "Anna."),
        ("butler", "Certainly, sir. Anna works at the bakery."),
        ("emoji", "Anna works at the bakery. 🥖🥖"),
    ],
)
def test_speaks_like_half_a_voice_is_refused(voice: str, answer: str) -> None:
    assert not speaks_like(voice, "Where does Anna work?", answer)


def test_content_right_wrong_fact_is_wrong_in_every_voice() -> None:
    asked = {exchange.question: exchange for exchange in fact_exchanges()}
    anna, ben = asked["Where does Anna work?"], asked["Where does Ben work?"]
    assert not any(content_right(voice, anna, render(voice, ben)) for voice in (BASE, *VOICES))


def test_same_question_has_one_answer() -> None:
    answered: dict[str, str] = {}
    for exchange in (*fact_exchanges(), *unknown_exchanges(), *talk_exchanges()):
        bare = exchange.question.lower().rstrip("?.! ")
        assert answered.setdefault(bare, exchange.english) == exchange.english, bare
