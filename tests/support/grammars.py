"""Constrained answers of small models: their grammars, their texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from support.core import prompt_of, request, tokens
from support.models import make_tokenizer

from loraplex.engines.native.grammar import Constraint, Grammars
from loraplex.engines.native.scheduler import Emission
from loraplex.engines.protocol import Grammar

END = 257


def closing_bias() -> dict[int, float]:
    """Towards the characters that end strings, numbers, arrays and objects."""
    tokenizer = make_tokenizer()
    ids: Any = [tokenizer.convert_tokens_to_ids(symbol) for symbol in '"}],:']
    return dict.fromkeys(ids, 5.0)


def ids_of(text: str) -> list[int]:
    ids: Any = make_tokenizer().convert_tokens_to_ids(list(text))
    return [int(token_id) for token_id in ids]


def begin(grammars: Grammars, regex: str) -> Constraint:
    """At its beginning, once it is compiled."""
    grammar = Grammar(kind="regex", source=regex)
    grammars.begin(grammar)
    while grammar not in grammars.ready():
        pass
    return grammars.constraint(grammar)


def text_of(emissions: list[Emission]) -> str:
    ids = [token for token in tokens(emissions) if token < 256]
    return str(make_tokenizer().decode(ids))


def json_request(name: str, schema: Any, **options: Any) -> Any:
    grammar = Grammar(kind="json_schema", source=json.dumps(schema))
    options = {"max_tokens": 600, "temperature": 1.0, "seed": 3, "logit_bias": closing_bias(), **options}
    return request(name, prompt_of(len(name), 9), grammar=grammar, **options)


def spy_on_compiling(monkeypatch: pytest.MonkeyPatch, first: Callable[[], object] = lambda: None) -> list[str]:
    """Sources in the order in which they are compiled, each after `first`."""
    compiled: list[str] = []
    original = Grammars._compile

    def compile_noted(self: Grammars, grammar: Grammar) -> object:
        first()
        compiled.append(grammar.source)
        return original(self, grammar)

    monkeypatch.setattr(Grammars, "_compile", compile_noted)
    return compiled
