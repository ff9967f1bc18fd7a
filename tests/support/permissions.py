"""Who may do what: the table of every route, what it means for every role, and docs/permissions.md made from it.

A new route is one line of ROWS. Where its path or body names a new kind of object, that is one more line of OBJECTS.

    PYTHONPATH=.src:tests python -m support.permissions > docs/permissions.md
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from support.gateway import BASE, Gateway

Role = Literal["nobody", "stranger", "inference", "tenant-admin", "admin"]
Whose = Literal["own", "foreign", "shared", "missing"]
ROLES: tuple[Role, ...] = ("nobody", "stranger", "inference", "tenant-admin", "admin")

OK = 0  # stands for the row's own status


@dataclass(frozen=True)
class Access:
    """What callers get for each kind of object; a kind that is not named is tried with none."""

    name: str
    meaning: str
    statuses: dict[Whose, dict[Role, int]]


def _by_role(inference: int, tenant_admin: int, admin: int, unknown: int = 401) -> dict[Role, int]:
    return {
        "nobody": unknown, "stranger": unknown, "inference": inference, "tenant-admin": tenant_admin, "admin": admin,
    }  # fmt: skip


EVERYONE = Access("everyone", "needs no key", {"shared": _by_role(OK, OK, OK, OK)})
CALLERS = Access("callers", "any good key", {"shared": _by_role(OK, OK, OK)})
OWNERS = Access(
    "owners",
    "any good key, for what belongs to its tenant or is shared; an admin has no tenant",
    {
        "own": _by_role(OK, OK, 404),
        "foreign": _by_role(404, 404, 404),
        "shared": _by_role(OK, OK, OK),
        "missing": _by_role(404, 404, 404),
    },
)
MANAGERS = Access(
    "managers",
    "the tenant's own admins, and admins",
    {"own": _by_role(403, OK, OK), "foreign": _by_role(403, 404, OK), "missing": _by_role(403, 404, 404)},
)
PRIVATE = Access(
    "owners",
    "any good key, for what belongs to its tenant",
    {"own": _by_role(OK, OK, 404), "foreign": _by_role(404, 404, 404), "missing": _by_role(404, 404, 404)},
)
# what is told of tenants that are there no more, too
HISTORY = Access(
    "history",
    "the tenant's own admins, and admins",
    {"own": _by_role(403, OK, OK), "foreign": _by_role(403, 404, OK), "missing": _by_role(403, 404, OK)},
)
# what a tenant's admin may read of its own tenant and only an admin may change
ADMINS = Access("admins", "admins alone", {"own": _by_role(403, 403, OK), "missing": _by_role(403, 403, 404)})
ADMINS_AT_LARGE = Access("admins", "admins alone", {"shared": _by_role(403, 403, OK)})


MANAGERS_AT_LARGE = Access("managers", "tenants' own admins, and admins", {"shared": _by_role(403, OK, OK)})
# from a local directory, which may hold others' files; from public places a tenant's own admins may as well
LOCAL_REGISTRARS = Access(
    "admins",
    "admins alone, from a local directory",
    {"own": _by_role(403, 403, OK), "foreign": _by_role(403, 404, OK), "missing": _by_role(403, 404, 404)},
)


@dataclass(frozen=True)
class Row:
    """One method of one route. Words in braces are objects, in the path and in the body alike.

    `at` is the application's path where more of it is fixed in this row than there.
    """

    method: str
    path: str
    access: Access
    ok: int = 200
    body: dict[str, Any] | None = None
    at: str = ""
    uploads: bool = False  # a file beside the form

    def expected(self, role: Role, whose: Whose) -> int:
        return self.access.statuses[whose][role] or self.ok

    @property
    def route(self) -> tuple[str, str]:
        """As the application knows it, whatever its parameters are called."""
        return self.method, self.at or re.sub(r"\{[^}]*\}", "{}", self.path.partition("?")[0])

    @property
    def changes_something(self) -> bool:
        is_inference = self.method == "POST" and self.path.startswith("/v1/") and "lora_adapter" not in self.path
        return self.method != "GET" and not is_inference


_CHAT = {"model": "{model}", "messages": [{"role": "user", "content": "x"}]}
_GENERATE = {"inputs": "x", "parameters": {"adapter_id": "{model}"}}
_TENANT = "/admin/v1/tenants/{tenant}"
_KEY = _TENANT + "/keys/{key}"
_BATCH = {"input_file_id": "{file}", "endpoint": "/v1/chat/completions", "completion_window": "24h"}
_RESPOND = {"model": "{model}", "input": "x"}
_OF = "?tenant_id={tenant}"
_ADAPTERS = "/admin/v1/adapters"
_ADAPTER = _ADAPTERS + "/{adapter}" + _OF
_LOCAL = {"source": "{source}", "tenant_id": "{tenant}"}
_ROUTES = "/admin/v1/routes"
_ROUTE = _ROUTES + "/{route}" + _OF
_TARGETS = {"targets": [{"model": "{adapter}", "weight": 1}]}
_SECRET = _TENANT + "/secrets/{secret}"

ROWS = (
    Row("GET", "/health", EVERYONE),
    Row("GET", "/ping", EVERYONE),
    Row("POST", "/ping", EVERYONE),
    Row("GET", "/", EVERYONE),
    Row("GET", "/startup", EVERYONE),
    Row("GET", "/info", CALLERS),
    Row("GET", "/openapi.json", EVERYONE),
    Row("GET", "/docs", EVERYONE),
    Row("GET", "/docs/{page}", EVERYONE),
    Row("POST", "/", OWNERS, body=_GENERATE),
    Row("POST", "/invocations", OWNERS, body=_GENERATE),
    Row("POST", "/generate", OWNERS, body=_GENERATE),
    Row("POST", "/generate_stream", OWNERS, body=_GENERATE),
    Row("POST", "/embed", OWNERS, body=_GENERATE),
    Row("POST", "/tokenize", OWNERS, body={"model": "{model}", "prompt": "x"}),
    Row("POST", "/detokenize", OWNERS, body={"model": "{model}", "tokens": [1]}),
    Row("GET", "/version", EVERYONE),
    Row("POST", "/v1/load_lora_adapter", ADMINS_AT_LARGE, body={"lora_name": "{fresh}", "lora_path": "{source}"}),
    Row("POST", "/v1/unload_lora_adapter" + _OF, MANAGERS, body={"lora_name": "{adapter}"}),
    Row("POST", "/classify", CALLERS, 422),
    Row("POST", "/classify_batch", CALLERS, 422),
    Row("GET", "/metrics", ADMINS_AT_LARGE),
    Row("POST", "/v1/chat/completions", OWNERS, body=_CHAT),
    Row("POST", "/v1/completions", OWNERS, body={"model": "{model}", "prompt": "x"}),
    Row("POST", "/v1/embeddings", OWNERS, body={"model": "{model}", "input": "x"}),
    Row("GET", "/v1/models", CALLERS),
    Row("GET", "/v1/models/{model}", OWNERS),
    Row("DELETE", "/v1/models/{adapter}" + _OF, MANAGERS),
    Row("POST", "/v1/responses", OWNERS, body=_RESPOND),
    Row("POST", "/v1/responses/input_tokens", OWNERS, body=_RESPOND),
    Row("POST", "/v1/responses/compact", CALLERS, 400, {}),  # not offered
    Row("GET", "/v1/responses/{response}", PRIVATE),
    Row("GET", "/v1/responses/{response}/input_items", PRIVATE),
    Row("POST", "/v1/responses/{response}/cancel", PRIVATE, 400),  # none runs in the background
    Row("DELETE", "/v1/responses/{response}", PRIVATE),
    Row("POST", "/v1/files", CALLERS, uploads=True, body={"purpose": "batch"}),
    Row("GET", "/v1/files", CALLERS),
    Row("GET", "/v1/files/{file}", PRIVATE),
    Row("GET", "/v1/files/{file}/content", PRIVATE),
    Row("DELETE", "/v1/files/{file}", PRIVATE),
    Row("POST", "/v1/batches", PRIVATE, body=_BATCH),
    Row("GET", "/v1/batches", CALLERS),
    Row("GET", "/v1/batches/{batch}", PRIVATE),
    Row("POST", "/v1/batches/{batch}/cancel", PRIVATE),
    Row("POST", "/admin/v1/tenants", ADMINS_AT_LARGE, 201, {"name": "{fresh}"}),
    Row("GET", "/admin/v1/tenants", ADMINS_AT_LARGE),
    Row("GET", _TENANT, MANAGERS),
    Row("DELETE", _TENANT, ADMINS, 204),
    Row("GET", _TENANT + "/limits", MANAGERS),
    Row("PUT", _TENANT + "/limits", ADMINS, body={"max_tokens": 50}),
    Row("GET", _TENANT + "/audit", MANAGERS),
    Row("POST", _TENANT + "/keys", MANAGERS, 201, {"name": "{fresh}"}),
    Row("GET", _TENANT + "/keys", MANAGERS),
    Row("GET", _KEY, MANAGERS),
    Row("DELETE", _KEY, MANAGERS, 204),
    Row("POST", _KEY + "/rotate", MANAGERS, body={}),
    Row("GET", _KEY + "/limits", MANAGERS),
    Row("PUT", _KEY + "/limits", MANAGERS, body={"max_tokens": 5}),
    Row("GET", _TENANT + "/secrets", MANAGERS),
    Row("PUT", _SECRET, MANAGERS, body={"value": "v"}),
    Row("DELETE", _SECRET, MANAGERS, 204),
    Row("POST", "/admin/v1/admin-keys", ADMINS_AT_LARGE, 201, {"name": "{fresh}"}),
    Row("GET", "/admin/v1/admin-keys", ADMINS_AT_LARGE),
    Row("DELETE", "/admin/v1/admin-keys/{admin_key}", ADMINS, 204),
    Row("GET", "/admin/v1/audit", ADMINS_AT_LARGE),
    Row("GET", "/admin/v1/usage?tenant_id={tenant}", HISTORY),
    Row("GET", "/admin/v1/usage/requests?tenant_id={tenant}", HISTORY),
    Row("GET", "/v1/organization/usage/completions?start_time=0", CALLERS),
    Row("POST", _ADAPTERS, LOCAL_REGISTRARS, 201, {"name": "{fresh}", **_LOCAL}),
    Row("POST", _ADAPTERS + "/validate", LOCAL_REGISTRARS, 200, _LOCAL),
    Row("POST", _ADAPTERS + "/upload?name={fresh}&tenant_id={tenant}", MANAGERS, 400, {}),  # the body is no archive
    Row("GET", _ADAPTERS, MANAGERS_AT_LARGE),
    Row("GET", _ADAPTER, MANAGERS),
    Row("PATCH", _ADAPTER, MANAGERS, body={"pinned": False}),
    Row("GET", _ADAPTERS + "/{adapter}/versions" + _OF, MANAGERS, at=_ADAPTERS + "/{}"),
    Row("POST", _ADAPTERS + "/{adapter}/warm" + _OF, MANAGERS, at=_ADAPTERS + "/{}"),
    Row("POST", _ADAPTERS + "/{adapter}/evict" + _OF, MANAGERS, at=_ADAPTERS + "/{}"),
    Row("POST", _ADAPTERS + "/{adapter}/pin" + _OF, MANAGERS, at=_ADAPTERS + "/{}"),
    Row("POST", _ADAPTERS + "/{adapter}/unpin" + _OF, MANAGERS, at=_ADAPTERS + "/{}"),
    Row("POST", _ADAPTERS + "/{adapter}/retry" + _OF, MANAGERS, 400, at=_ADAPTERS + "/{}"),  # it did not fail
    Row("POST", _ADAPTERS + "/{adapter}/rollback" + _OF, MANAGERS, 400, {}, at=_ADAPTERS + "/{}"),  # it has one version
    Row("DELETE", _ADAPTER, MANAGERS, 204),
    Row("POST", _ROUTES, MANAGERS, 201, {"name": "{fresh}", **_TARGETS, "tenant_id": "{tenant}"}),
    Row("GET", _ROUTES, MANAGERS_AT_LARGE),
    Row("GET", _ROUTE, MANAGERS),
    Row("PUT", _ROUTE, MANAGERS, body=_TARGETS),
    Row("DELETE", _ROUTE, MANAGERS, 204),
    Row("GET", "/admin/v1/engine", ADMINS_AT_LARGE),
    Row("GET", "/admin/v1/engine/stats", ADMINS_AT_LARGE),
    Row("POST", "/admin/v1/engine/reload", ADMINS_AT_LARGE),
)


@dataclass
class World:
    """Two tenants of the test's own, with keys; the first is the caller's."""

    gateway: Gateway
    tenants: list[str] = field(default_factory=list)
    keys: dict[Role, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for _ in range(2):
            self.tenants.append(self.make("/admin/v1/tenants", name=fresh())["id"])
        own = f"/admin/v1/tenants/{self.tenants[0]}/keys"
        self.keys = {
            "nobody": None,
            "stranger": "sk-loraplex-00000000-" + "0" * 43 + "-000000",
            "inference": self.make(own)["key"],
            "tenant-admin": self.make(own, role="tenant-admin")["key"],
            "admin": self.gateway.admin_key,
        }

    def make(self, path: str, **body: object) -> dict[str, Any]:
        with self.gateway.admin() as admin:
            answer = admin.post(path, json=body)
            assert answer.status_code == 201, answer.text
            made: dict[str, Any] = answer.json()
            return made

    def call(self, row: Row, role: Role, whose: Whose) -> int:
        """The status of the row's request."""
        method, path = row.method, self._filled(row.path, whose)
        body = self._filled(row.body, whose)
        with self.gateway.client() as client:
            del client.headers["authorization"]
            headers = {"authorization": f"Bearer {self.keys[role]}"} if self.keys[role] else {}
            if row.uploads:
                return client.request(method, path, data=body, files=_FILE, headers=headers).status_code
            return client.request(method, path, json=body, headers=headers).status_code

    def _filled(self, value: Any, whose: Whose) -> Any:
        if isinstance(value, str):
            return re.sub(r"\{(\w+)\}", lambda match: OBJECTS[match[1]](self, whose), value)
        if isinstance(value, dict):
            return {name: self._filled(part, whose) for name, part in value.items()}
        return [self._filled(part, whose) for part in value] if isinstance(value, list) else value


_LINE = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {**_CHAT, "model": BASE}}
_FILE = {"file": ("batch.jsonl", json.dumps(_LINE).encode())}


def fresh() -> str:
    return f"matrix-{uuid.uuid4().hex[:12]}"


def _tenant(world: World, whose: Whose) -> str:
    return {"own": world.tenants[0], "foreign": world.tenants[1]}.get(whose, "tenant_0000000000000000")


def _key(world: World, whose: Whose) -> str:
    if whose == "missing":
        return "key_0000000000000000"
    return str(world.make(f"/admin/v1/tenants/{_tenant(world, whose)}/keys")["id"])


def _secret(world: World, whose: Whose) -> str:
    if whose != "missing":
        with world.gateway.admin() as admin:
            path = f"/admin/v1/tenants/{_tenant(world, whose)}/secrets/hub_token"
            assert admin.put(path, json={"value": "v"}).status_code == 200
    return "hub_token"


def _admin_key(world: World, whose: Whose) -> str:
    return "admin_0" if whose == "missing" else str(world.make("/admin/v1/admin-keys", name="matrix")["id"])


def _source(world: World, whose: Whose) -> str:
    return str(world.gateway.adapter_dir / "shared")


def _adapter(world: World, whose: Whose) -> str:
    """A tenant's."""
    name = fresh()
    if whose != "missing":
        tenant = _tenant(world, whose)
        world.make("/admin/v1/adapters", name=name, source=_source(world, whose), tenant_id=tenant)
    return name


def _file(world: World, whose: Whose) -> str:
    if whose == "missing":
        return "file-000000000000000000000000"
    key = world.make(f"/admin/v1/tenants/{_tenant(world, whose)}/keys")["key"]
    with world.gateway.client(key) as client:
        made = client.post("/v1/files", data={"purpose": "batch"}, files=_FILE)
        assert made.status_code == 200, made.text
        return str(made.json()["id"])


def _batch(world: World, whose: Whose) -> str:
    if whose == "missing":
        return "batch_000000000000000000000000"
    key = world.make(f"/admin/v1/tenants/{_tenant(world, whose)}/keys")["key"]
    with world.gateway.client(key) as client:
        made = client.post("/v1/batches", json={**_BATCH, "input_file_id": _file(world, whose)})
        assert made.status_code == 200, made.text
        return str(made.json()["id"])


def _response(world: World, whose: Whose) -> str:
    if whose == "missing":
        return "resp_000000000000000000000000"
    key = world.make(f"/admin/v1/tenants/{_tenant(world, whose)}/keys")["key"]
    with world.gateway.client(key) as client:
        made = client.post("/v1/responses", json={"model": BASE, "input": "x"})
        assert made.status_code == 200, made.text
        return str(made.json()["id"])


def _route(world: World, whose: Whose) -> str:
    name = fresh()
    if whose != "missing":
        targets = [{"model": _adapter(world, whose), "weight": 1}]
        world.make("/admin/v1/routes", name=name, targets=targets, tenant_id=_tenant(world, whose))
    return name


def _model(world: World, whose: Whose) -> str:
    return BASE if whose == "shared" else _adapter(world, whose)


OBJECTS: dict[str, Callable[[World, Whose], str]] = {
    "fresh": lambda world, whose: fresh(),
    "tenant": _tenant,
    "key": _key,
    "secret": _secret,
    "admin_key": _admin_key,
    "source": _source,
    "adapter": _adapter,
    "route": _route,
    "file": _file,
    "batch": _batch,
    "response": _response,
    "page": lambda world, whose: "swagger-ui.css",
    "model": _model,
}


def markdown() -> str:
    """The table as a page of the documentation."""
    lines = [
        "# Who may do what",
        "",
        "Every route, and the status that each kind of caller gets. Made from the table that the tests hold the server",
        "to. *Own* is what belongs to the caller's tenant, *foreign* what belongs to another; where a caller may not",
        "know of an object, it looks nonexistent. Without a key, and with a bad one, every route but the open ones",
        "answers 401. What is there for admins is there for every tenant.",
        "",
        "| method | path | inference key | tenant-admin | admin |",
        "|---|---|---|---|---|",
    ]
    for row in ROWS:
        path = row.path.partition("?")[0]
        shown = [row.method, f"`{path}`" + (" (open)" if row.access is EVERYONE else "")]
        shown += [_cell(row, role) for role in ROLES[2:]]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def _cell(row: Row, role: Role) -> str:
    found = {whose: row.expected(role, whose) for whose in row.access.statuses if whose != "missing"}
    if len(set(found.values())) == 1:
        return str(next(iter(found.values())))
    return ", ".join(f"{whose} {status}" for whose, status in found.items())


if __name__ == "__main__":
    print(markdown(), end="")
