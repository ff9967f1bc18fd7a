"""What an adapter's tokenizer files change of its base's tokenizer, found by a process of its own.

A tokenizer.json holds patterns and programs, so an adapter's is never run beside other requests: what may come from it
are added tokens and the tokens put around a text. Everything else must be as the base has it.

    python -m loraplex.engines.adapters.vocabulary DIRECTORY NUM_ROWS < the base's tokenizer.json
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from loraplex.engines.chat_template import special_tokens
from loraplex.engines.errors import (
    AdapterError,
    AdapterInvalid,
    AdapterMismatch,
    AdapterUnsupported,
    from_wire,
    to_wire,
)

_CPU_SECONDS = 60
_MAX_BYTES = 4 * 2**30
_MAX_AROUND = 64 * 2**10  # characters of a post_processor
_MOST_AROUND = 64  # tokens that it adds
_ENVIRONMENT = ("PATH", "PYTHONPATH", "LANG", "LC_ALL")
_SAME_PARTS = ("normalizer", "pre_tokenizer", "decoder")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class AddedToken(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of a tokenizer.json's `added_tokens`."""

    id: int
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


class _Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of the base's tokenizer.json to be replaced, or an error as `to_wire` has it."""

    changes: dict[str, Any] = {}
    error: tuple[str, str, str | None] | None = None


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file holds; an empty one where there is no file. Raises AdapterInvalid."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterInvalid(f"{path.name} cannot be read: {str(error)[:200]}") from error
    if not isinstance(found, dict):
        raise AdapterInvalid(f"{path.name} is not a JSON object")
    return found


def stated_tokens(directory: Path) -> list[AddedToken]:
    """What tokenizer_config.json and added_tokens.json say of added tokens, by id. Raises AdapterInvalid."""
    config = read_json(directory / "tokenizer_config.json")
    special = {text for text in special_tokens(config).values() if isinstance(text, str)}
    special |= {text for text in config.get("additional_special_tokens") or [] if isinstance(text, str)}
    found: dict[int, AddedToken] = {}
    try:
        for key, told in (config.get("added_tokens_decoder") or {}).items():
            flags = {flag: told[flag] for flag in _FLAGS if flag in told}
            found[int(key)] = msgspec.convert({"id": int(key), "content": told["content"], **flags}, AddedToken)
        for content, token_id in read_json(directory / "added_tokens.json").items():
            is_special = content in special
            token = AddedToken(id=token_id, content=content, special=is_special, normalized=not is_special)
            token = msgspec.convert(msgspec.to_builtins(token), AddedToken)
            if found.setdefault(token_id, token).content != content:
                raise AdapterInvalid(f"tokenizer_config.json and added_tokens.json differ in the token {token_id}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise AdapterInvalid(f"its added tokens cannot be read: {str(error)[:200]}") from error
    return [found[token_id] for token_id in sorted(found)]


def changed_parts(directory: Path, base: str, num_rows: int) -> dict[str, Any]:
    """Which parts of the base's tokenizer.json the adapter's files replace: `added_tokens`, `post_processor`.

    Blocks. Raises AdapterInvalid, AdapterMismatch where ids contradict the base's or the model has no rows for them,
    AdapterUnsupported for any other difference.
    """
    made = subprocess.run(
        [sys.executable, "-m", "loraplex.engines.adapters.vocabulary", str(directory), str(num_rows)],
        input=base.encode(),
        capture_output=True,
        check=False,
        env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
    )
    if made.returncode != 0:
        raise AdapterInvalid("its tokenizer files cannot be read, or take too much time or memory to read")
    outcome = msgspec.json.decode(made.stdout, type=_Outcome)
    if outcome.error is not None:
        error = from_wire(*outcome.error)
        raise error if isinstance(error, AdapterError) else AdapterInvalid(str(error))
    return outcome.changes


def _compare(directory: Path, base_text: str, num_rows: int) -> dict[str, Any]:
    base_tokenizer, base = Tokenizer.from_str(base_text), json.loads(base_text)
    ids = base_tokenizer.get_vocab(with_added_tokens=True)
    added = {token["id"]: token for token in base["added_tokens"]}
    changes: dict[str, Any] = {}
    path = directory / "tokenizer.json"
    tokens: list[AddedToken] = []
    if path.is_file():
        own_tokenizer = Tokenizer.from_file(str(path))
        _require_same_ids(own_tokenizer.get_vocab(with_added_tokens=True).items(), base_tokenizer, ids, num_rows)
        own = json.loads(own_tokenizer.to_str())
        _require_same_parts(own, base)
        if own["post_processor"] != base["post_processor"]:
            changes["post_processor"] = own["post_processor"]
        tokens = msgspec.convert(own["added_tokens"], list[AddedToken])
    told = stated_tokens(directory)
    _require_same_ids([(token.content, token.id) for token in told], base_tokenizer, ids, num_rows)
    own_ids = {token.id: token.content for token in tokens}
    for token in told:
        if own_ids.get(token.id, token.content) != token.content:
            raise AdapterInvalid(f"tokenizer.json and the files beside it call the token {token.id} differently")
    listed = {token.id for token in tokens}
    tokens += [token for token in told if token.id not in listed and token.content not in ids]
    new = {token.id: msgspec.to_builtins(token) for token in tokens}
    if {**added, **new} != added:
        changes["added_tokens"] = [token for _, token in sorted({**added, **new}.items())]
    _require_built(base | changes)
    return changes


def _require_same_ids(own: Iterable[tuple[str, int]], base: Tokenizer, ids: Mapping[str, int], num_rows: int) -> None:
    for content, token_id in sorted(own, key=lambda entry: entry[1]):
        if ids.get(content, token_id) != token_id:
            raise AdapterMismatch(
                f"its tokenizer has {_shown(content)} as the token {token_id}, the base's as {ids[content]}"
            )
        other = base.id_to_token(token_id)
        if other is not None and other != content:
            raise AdapterMismatch(
                f"its tokenizer has {_shown(content)} as the token {token_id}, which is {_shown(other)} in the base's"
            )
        if token_id >= num_rows:
            raise AdapterMismatch(
                f"its tokenizer adds {_shown(content)} as the token {token_id}, for which the model has no row: its "
                f"embeddings end at {num_rows - 1}"
            )


def _require_same_parts(own: dict[str, Any], base: dict[str, Any]) -> None:
    for part in _SAME_PARTS:
        if own[part] != base[part]:
            raise AdapterUnsupported(f"its tokenizer.json has another {part} than the base's")
    if own["model"] != base["model"]:
        raise AdapterUnsupported("its tokenizer.json has another model than the base's; only tokens may be added to it")
    if len(json.dumps(own["post_processor"])) > _MAX_AROUND:
        raise AdapterUnsupported("its tokenizer.json has a post_processor beyond all measure")


def _require_built(whole: dict[str, Any]) -> None:
    """Raises AdapterUnsupported where an added token's id is not the next one that is free."""
    tokenizer = Tokenizer.from_str(json.dumps(whole))
    for token in whole["added_tokens"]:
        if tokenizer.token_to_id(token["content"]) != token["id"]:
            raise AdapterUnsupported(
                f"its tokenizer adds {_shown(token['content'])} as the token {token['id']}, which leaves ids out"
            )
    _require_few_around(tokenizer, Tokenizer.from_str(json.dumps({**whole, "post_processor": None})))


def _require_few_around(tokenizer: Tokenizer, plain: Tokenizer) -> None:
    """Raises AdapterUnsupported where its post_processor does more than put some tokens around a text, or breaks.

    `plain` is the same without one.
    """
    try:
        around = len(tokenizer.encode("").ids)
        more = len(tokenizer.encode("a a").ids) - len(plain.encode("a a").ids)
    except BaseException as error:
        if isinstance(error, MemoryError | KeyboardInterrupt | SystemExit):
            raise
        raise AdapterUnsupported("its tokenizer.json has a post_processor that takes no text alone") from error
    if around > _MOST_AROUND or more != around:
        raise AdapterUnsupported(
            f"its tokenizer.json has a post_processor that does more than put {_MOST_AROUND} tokens around a text"
        )


def _shown(content: str) -> str:
    return ascii(content)[:80]


def main() -> None:
    """Print an _Outcome."""
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_BYTES, _MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        outcome = _Outcome(changes=_compare(Path(sys.argv[1]), sys.stdin.read(), int(sys.argv[2])))
    except AdapterError as error:
        outcome = _Outcome(error=to_wire(error))
    except Exception as error:  # noqa: BLE001  the library's complaint of a file, of no class of its own
        complaint = AdapterInvalid(f"its tokenizer files cannot be read: {ascii(str(error))[:200]}")
        outcome = _Outcome(error=to_wire(complaint))
    sys.stdout.buffer.write(msgspec.json.encode(outcome))


if __name__ == "__main__":
    main()
