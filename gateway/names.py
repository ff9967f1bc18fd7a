"""The names of one server as they are at a moment: what a name stands for, which are free, and where routes lead."""

import hashlib
import random
import re
from collections.abc import Mapping

from loraplex.engines.protocol import AdapterResidency, AdapterUse
from loraplex.gateway.adapter_records import SHARED, Key, Registered, Target, Version
from loraplex.gateway.errors import AdapterNameTaken, AdapterNotRegistered, MalformedRequest, ModelNotFound
from loraplex.gateway.pins import pins_of

_NAME = re.compile(r"(?=.{1,128}$)[A-Za-z0-9][A-Za-z0-9._:-]*(/[A-Za-z0-9_:-][A-Za-z0-9._:-]*)*")
_NUMBER = re.compile(r"[1-9][0-9]{0,6}")
_HASH = re.compile(r"[0-9a-f]{8,64}")
_ADAPTERS = "/admin/v1/adapters"
_OWN_PATHS = frozenset({"upload", "validate"})


class Names:
    """Of the base, and of the adapters and routes of all tenants and those shared. Never changes: see `changed`."""

    def __init__(self, base: str, entries: Mapping[Key, Registered]) -> None:
        self._base = base
        self.entries = entries

    def changed(self, key: Key, entry: Registered | None) -> "Names":
        """The same with another entry under this key, or with none."""
        entries = dict(self.entries)
        if entry is None:
            entries.pop(key, None)
        else:
            entries[key] = entry
        return Names(self._base, entries)

    def get(self, key: Key) -> Registered:
        """Raises AdapterNotRegistered."""
        entry = self.entries.get(key)
        if entry is None:
            raise AdapterNotRegistered(f"There is no adapter {key[1]!r}.", "name")
        return entry

    def adapter(self, key: Key) -> Registered:
        """Raises AdapterNotRegistered, or MalformedRequest for a route."""
        entry = self.get(key)
        if entry.targets is not None:
            raise MalformedRequest(f"{key[1]!r} is a route, not an adapter.", "name")
        return entry

    def find(self, name: str, tenant_id: str) -> Registered | None:
        """What a tenant means by a name: its own, or what is shared."""
        return self.entries.get((tenant_id, name)) or self.entries.get((SHARED, name))

    def resolve(self, model: str, tenant_id: str) -> tuple[Registered, Version | None] | None:
        """What `name` or `name@version` stands for; None where there is none of that name, or no such version of it."""
        name, at, wanted = model.partition("@")
        entry = self.find(name, tenant_id)
        version = None if entry is None else version_of(entry, wanted if at else None)
        if entry is None or (version is None and (at or not entry.targets)):
            return None
        return entry, version

    def target(self, route: Registered, user: str | None) -> tuple[Registered, Version]:
        """Where a route leads this time. Raises ModelNotFound where the target is gone."""
        assert route.targets is not None, "it is a route"
        share = random.random()
        if user is not None:
            digest = hashlib.sha256(f"{route.tenant_id}\0{route.name}\0{user}".encode()).digest()
            share = int.from_bytes(digest[:8]) / 2**64
        point = share * sum(target.weight for target in route.targets)
        for target in route.targets:
            point -= target.weight
            if point < 0:
                break
        name, _, wanted = target.model.partition("@")
        entry = self.find(name, route.tenant_id)
        version = None if entry is None else version_of(entry, wanted or None)
        if entry is None or version is None:
            raise ModelNotFound(f"The route {route.name!r} leads to {target.model!r}, which is not there.", "model")
        return entry, version

    def check_targets(self, targets: tuple[Target, ...], tenant_id: str) -> None:
        """Raises MalformedRequest, naming the one that is no adapter of the tenant's or a shared one."""
        for place, target in enumerate(targets):
            name, _, wanted = target.model.partition("@")
            entry = self.find(name, tenant_id)
            if entry is None or (entry.targets is None and version_of(entry, wanted or None) is None):
                raise MalformedRequest(f"There is no adapter {target.model!r}.", f"targets[{place}].model")
            if entry.targets is not None:
                raise MalformedRequest(f"{target.model!r} is a route itself.", f"targets[{place}].model")

    def route_to(self, entry: Registered) -> Registered | None:
        """A route that would miss this entry."""
        return next(
            (
                route
                for route in self.entries.values()
                for target in route.targets or ()
                if self.find(target.model.partition("@")[0], route.tenant_id) is entry
            ),
            None,
        )

    def num_requests(self, entry: Registered, residency: Mapping[str, AdapterResidency]) -> int:
        """How many requests name this entry right now; not those of others that have the same content."""
        uses = [use for one in contents(entry) if one in residency for use in residency[one].uses]
        own = [use for use in uses if use.name == entry.name and self._key_of(use) == entry.key]
        return sum(use.num_requests for use in own)

    def _key_of(self, use: AdapterUse) -> Key | None:
        entry = self.find(use.name, use.tenant)
        return None if entry is None else entry.key

    def pinned_by_others(self, entry: Registered) -> set[str]:
        """The contents that other entries keep on the device."""
        return {other.shown.adapter_id for other in pins_of(self.entries.values()) if other is not entry}

    def only_its_own(self, entry: Registered) -> set[str]:
        """The contents that no other name leads to."""
        others = {one for other in self.entries.values() if other is not entry for one in contents(other)}
        return contents(entry) - others

    def require_free(self, key: Key) -> None:
        """Raises MalformedRequest or AdapterNameTaken for a name that cannot be registered."""
        name = key[1]
        if _NAME.fullmatch(name) is None:
            raise MalformedRequest(
                f"{name!r} is not a model name: 1 to 128 letters, digits and any of . _ / : - are, "
                "where no part between slashes is empty or begins with a dot.",
                "name",
            )
        if (reserved := _reserved(name)) is not None:
            message = f"{name!r} would hide {_ADAPTERS}/{reserved} of the admin API; choose another name."
            raise MalformedRequest(message, "name")
        if name == self._base or key in self.entries:
            raise AdapterNameTaken(f"There is a model named {name!r} already.", "name")


def _reserved(name: str) -> str | None:
    """What of the admin API, below its adapters, goes by this path."""
    if name in _OWN_PATHS:
        return name
    return "NAME/versions" if name.endswith("/versions") else None


def contents(entry: Registered) -> set[str]:
    """The content hashes of all its versions."""
    return {version.adapter_id for version in entry.versions if version.adapter_id}


def version_of(entry: Registered, wanted: str | None) -> Version | None:
    """The current version; or the one with this number, or the newest whose content's hash begins like this."""
    if entry.targets is not None:
        return None
    if wanted is None:
        return entry.shown
    if _NUMBER.fullmatch(wanted):
        return entry.version(int(wanted))
    if not _HASH.fullmatch(wanted):
        return None
    return next((one for one in reversed(entry.versions) if one.adapter_id.startswith(wanted)), None)
