"""An engine core over the small world, fed and stepped by hand."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from typing import Any

from support.worlds import SmallWorld

from loraplex.engines.native.core import EngineCore
from loraplex.engines.native.loading import load_machine
from loraplex.engines.native.scheduler import Emission
from loraplex.engines.protocol import Adapter, GenerateRequest, SamplingParams


def make_core(small: SmallWorld, **engine: Any) -> EngineCore:
    return EngineCore(load_machine(small.settings(**engine), lambda progress: None))


def request(name: str, prompt: list[int], adapter: Adapter | None = None, **sampling: Any) -> GenerateRequest:
    params = SamplingParams(**{"max_tokens": 12, "temperature": 0.0, **sampling})
    return GenerateRequest(request_id=name, prompt_token_ids=tuple(prompt), adapter=adapter, sampling=params)


def run(core: EngineCore, seconds: float = 60.0) -> dict[str, list[Emission]]:
    """Step until nothing is left; emissions by request."""
    emissions: dict[str, list[Emission]] = defaultdict(list)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not core.has_work:
            return emissions
        for emission in core.step():
            emissions[emission.sequence.request_id].append(emission)
        if not core.scheduler.running:
            time.sleep(0.001)  # adapters are being read
    raise AssertionError("the engine did not finish")


def tokens(emissions: list[Emission]) -> list[int]:
    return [emission.sampled.token_id for emission in emissions if emission.sampled is not None]


def prompt_of(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(256), k=length)
