"""An engine that keeps its own count of what it generated, in a file that outlives its process."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

from loraplex.config.settings import Settings
from loraplex.engines.echo import EchoEngine
from loraplex.engines.protocol import GenerateRequest, TokenEvent
from loraplex.gateway.cli import serve_command

STEP_SECONDS = 0.002


class WitnessEngine(EchoEngine):
    """An echo that writes a line for every token before it hands it over, to the file that WITNESS_FILE names."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, STEP_SECONDS)
        self._file = os.open(os.environ["WITNESS_FILE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        async with aclosing(super().generate(request)) as events:  # type: ignore[type-var]
            async for event in events:
                os.write(self._file, f"{request.request_id}\n".encode() * len(event.token_ids))
                yield event


def generated(path: Path) -> Counter[str]:
    """Tokens by the id of a choice."""
    return Counter(path.read_text().split()) if path.exists() else Counter()


def install(home: Path) -> dict[str, str]:
    """Make the engine known as `witness`, as a third party's package would; returns the environment it needs."""
    package = home / "packages" / "loraplex_witness-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: loraplex-witness\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[loraplex.engines]\nwitness = support.witness:WitnessEngine\n")
    return {"WITNESS_FILE": str(home / "witness"), "WITNESS_PACKAGES": str(package.parent)}


def run_gateway(config: Path, environment: dict[str, str], log: Path) -> None:
    """`loraplex serve --config CONFIG` in this process, once `install` has run."""
    os.environ.update(environment)
    sys.path.append(environment["WITNESS_PACKAGES"])
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    serve_command(config)
