"""The settings of `engine.kind = "upstream"`: which server computes, and what this gateway may ask of it."""

from __future__ import annotations

import re
from typing import Annotated

from loraplex.config.sections import Help, PositiveInt, Section

_ADDRESS = re.compile(r"https?://[^/?#@\s]+(/[^?#@\s]*)?")


class UpstreamSettings(Section, frozen=True):
    """For `engine.kind = "upstream"` alone."""

    url: Annotated[
        str | None,
        Help(description="Address of the server that computes, without /v1, such as `http://10.0.0.5:8000`."),
    ] = None
    api_key_env: Annotated[
        str, Help(description="Environment variable with the key it asks for; unset: it is sent none.")
    ] = "LORAPLEX_UPSTREAM_KEY"
    model: Annotated[
        str | None, Help(description="The base model's name there; its first model that is no adapter if unset.")
    ] = None
    ca_file: Annotated[
        str | None, Help(description="Certificate authorities that its certificate is checked against, PEM.")
    ] = None
    max_adapters: Annotated[
        PositiveInt, Help(description="Adapters loaded there at the same time; idle ones make room for others.")
    ] = 64
    path_prefix: Annotated[
        tuple[str, str] | None,
        Help(
            description="How it finds adapters.cache_dir: what paths begin with here, and what they begin with there."
        ),
    ] = None
    sends_priority: Annotated[
        bool, Help(description="Tell it each request's priority (vLLM: with --scheduling-policy priority).")
    ] = False
    connect_seconds: Annotated[float, Help(gt=0, description="How long a connection to it may take.")] = 5.0
    load_seconds: Annotated[float, Help(gt=0, description="How long it may take to load or unload an adapter.")] = 120.0
    poll_seconds: Annotated[float, Help(gt=0, description="Pause between two looks at its health.")] = 1.0

    def __post_init__(self) -> None:
        if self.url is None:
            return
        if not _ADDRESS.fullmatch(self.url) or self.url.rstrip("/").endswith("/v1"):
            raise ValueError("`url` is an address without user, query and /v1, such as http://10.0.0.5:8000")
