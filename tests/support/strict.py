"""Answers held to the types of the OpenAI SDK: nothing missing, nothing of another type, nothing it does not know."""

from __future__ import annotations

from typing import Any, TypeVar

import httpx
from pydantic import BaseModel

T = TypeVar("T", bound=BaseModel)


def strictly(kind: type[T], response: httpx.Response | bytes, *, extensions: frozenset[str] = frozenset()) -> T:
    """The answer as this type. `extensions` are dotted paths of fields that we have and OpenAI has not.

    Raises pydantic's ValidationError for a wrong type or a missing field, AssertionError for an unknown field.
    """
    if isinstance(response, httpx.Response):
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "application/json"
    raw = response if isinstance(response, bytes) else response.content
    found = kind.model_validate_json(raw, strict=True)
    assert set(unknown_fields(found)) <= extensions, set(unknown_fields(found)) - extensions
    return found


def unknown_fields(value: Any, path: str = "") -> list[str]:
    """Paths of fields that the SDK keeps without knowing them; list places are left out."""
    if isinstance(value, list | tuple):
        return [name for item in value for name in unknown_fields(item, path)]
    if not isinstance(value, BaseModel):
        return []
    extra = [f"{path}{name}" for name in value.model_extra or {}]
    known = [(name, getattr(value, name)) for name in type(value).model_fields]
    return extra + [found for name, inner in known for found in unknown_fields(inner, f"{path}{name}.")]
