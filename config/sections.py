"""What the tables of the settings file are made of."""

from __future__ import annotations

from typing import Annotated

import msgspec

Help = msgspec.Meta
PositiveInt = Annotated[int, msgspec.Meta(ge=1)]
MebibyteAtLeast = Annotated[int, msgspec.Meta(ge=2**20)]
Share = Annotated[float, msgspec.Meta(gt=0, lt=1)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file. An unknown key is an error, so that a typo is never a silent default."""
