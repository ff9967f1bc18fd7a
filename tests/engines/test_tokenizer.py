"""Our tokenizer and chat template against transformers' own, on the same files."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from support.models import make_tokenizer
from transformers import AutoTokenizer

from loraplex.engines.errors import InvalidRequest, ModelNotServable
from loraplex.engines.tokenizer import HubTokenizer
from loraplex.engines.tokenizer_protocol import ChatMessage

CHAT = [ChatMessage(role="system", content="Be kind."), ChatMessage(role="user", content="Grüße 🦜\n<|end|>")]
TEMPLATES = {
    "plain": None,
    "trim": "{% for m in messages %}\n  {{- m.role | upper }}: {{ m['content'] | trim }}\n{% endfor %}{{ bos_token }}",
    "tojson": "{{ messages | tojson }}{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}x{% endfor %}",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_encode_chat_equals_transformers(tmp_path: Path, template: str) -> None:
    theirs = make_tokenizer()
    theirs.chat_template = TEMPLATES[template] or theirs.chat_template
    theirs.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": message.role, "content": message.content or ""} for message in CHAT]
    expected = loaded.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert HubTokenizer(tmp_path).encode_chat(CHAT) == expected


@pytest.mark.parametrize("text", ["Grüße 🦜 and more", "<|end|>a<|end|>", "", " leading"])
def test_spans_equal_transformers(tmp_path: Path, text: str) -> None:
    theirs = make_tokenizer()
    theirs.save_pretrained(tmp_path)
    ours = HubTokenizer(tmp_path)
    expected = theirs(text, return_offsets_mapping=True)
    found = ours.spans(text)
    assert [span.token_id for span in found] == expected["input_ids"] == ours.encode(text)
    assert [(span.start, span.stop) for span in found] == expected["offset_mapping"]


def test_decode_tells_special_tokens_where_asked(tmp_path: Path) -> None:
    theirs = make_tokenizer()
    theirs.save_pretrained(tmp_path)
    ours = HubTokenizer(tmp_path)
    token_ids = theirs("a<|end|>b")["input_ids"]
    assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True) == "ab"
    assert ours.decode(token_ids, skip_special_tokens=False) == theirs.decode(token_ids) == "a<|end|>b"
    assert ours.special_token_ids >= set(theirs.all_special_ids)
    assert ours.encode("a")[0] not in ours.special_token_ids


def test_encode_chat_template_that_raises_is_the_requests_error(tmp_path: Path) -> None:
    theirs = make_tokenizer()
    theirs.chat_template = "{{ raise_exception('no system role here') }}"
    theirs.save_pretrained(tmp_path)
    with pytest.raises(InvalidRequest, match="no system role here"):
        HubTokenizer(tmp_path).encode_chat(CHAT)


def test_encode_chat_template_cannot_reach_python(tmp_path: Path) -> None:
    theirs = make_tokenizer()
    theirs.chat_template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    theirs.save_pretrained(tmp_path)
    with pytest.raises(InvalidRequest, match="unsafe"):
        HubTokenizer(tmp_path).encode_chat(CHAT)


@pytest.mark.parametrize("text", ["plain", "Grüße 🦜\n\t", "\u00a0\u00ad"])
def test_token_bytes_join_to_the_text(tmp_path: Path, text: str) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = HubTokenizer(tmp_path)
    assert b"".join(tokenizer.token_bytes(token) for token in tokenizer.encode(text)) == text.encode()
    assert tokenizer.token_bytes(257) == b"<|end|>"


def test_encode_long_text_lets_other_threads_work(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = HubTokenizer(tmp_path)
    text = "hello there, my friend " * 40_000
    worker = threading.Thread(target=tokenizer.encode, args=(text,))
    worker.start()
    num_turns = 0
    while worker.is_alive():
        time.sleep(
            0.001
        )  # a turn needs the interpreter's lock, which one text of a megabyte would keep for all its time
        num_turns += 1
    assert num_turns >= 10


def test_init_without_tokenizer_raises_not_servable(tmp_path: Path) -> None:
    with pytest.raises(ModelNotServable):
        HubTokenizer(tmp_path)
