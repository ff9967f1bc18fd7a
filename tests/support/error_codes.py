"""Every code of an error, and docs/errors.md made from the table that the gateway answers by.

PYTHONPATH=.src:tests python -m support.error_codes > docs/errors.md
"""

from __future__ import annotations

import inspect
from collections import defaultdict

from loraplex.gateway.problems import TABLE, Row

_HEAD = """\
# Errors

Every error is `{"error": {"message", "type", "param", "code"}}`, before a stream begins with its status, after that as
the stream's last frame. `param` names the field that is to blame, if one is. Made from the table that the server
answers by. LoRAX's routes tell them as LoRAX does ([lorax.md](lorax.md)), vLLM's as vLLM does ([vllm.md](vllm.md)).

| `code` | status | `type` | when |
|---|---|---|---|
"""
# What is raised by no class of ours: see `problem_of`.
_OTHERS = {
    ("method_not_allowed", 405, "invalid_request_error"): ["The route takes other methods."],
    ("not_found", 404, "invalid_request_error"): ["There is no such route."],
    ("request_too_large", 413, "invalid_request_error"): ["The body is larger than `server.max_body_bytes`."],
    ("internal_error", 500, "server_error"): ["Something that nobody foresaw; it is in the log, with its traceback."],
}


def meaning(kind: type[Exception]) -> str:
    """The first sentence of a class's docstring, without what says how it is made."""
    sentence = (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")
    return sentence.partition("; `str(error)`")[0].partition("; `param`")[0].rstrip(".") + "."


def markdown() -> str:
    found: defaultdict[tuple[str, int, str], list[str]] = defaultdict(list, _OTHERS)
    retried = set()
    for kind, row in TABLE.items():
        if kind.__subclasses__() and (inspect.getdoc(kind) or "").startswith("Base"):
            continue  # of which only what derives from it is raised
        found[key_of(row)].append(meaning(kind))
        if row.retry_after is not None:
            retried.add(key_of(row))
    rows = []
    for (code, status, type_), meanings in sorted(found.items()):
        again = " `Retry-After` says when to try again." if (code, status, type_) in retried else ""
        rows.append(f"| `{code}` | {status} | `{type_}` | {' '.join(dict.fromkeys(meanings))}{again} |\n")
    return _HEAD + "".join(rows)


def key_of(row: Row) -> tuple[str, int, str]:
    return row.code, row.status, row.type


if __name__ == "__main__":
    print(markdown(), end="")
