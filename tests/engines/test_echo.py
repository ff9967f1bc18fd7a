"""The echo engine's embeddings, computed by hand."""

from __future__ import annotations

import asyncio
import math

import pytest

from loraplex.config.settings import Model, Settings
from loraplex.engines.echo import EchoEngine
from loraplex.engines.errors import EngineDied, EngineUnavailable, GenerationFailed, InvalidRequest, PromptTooLong
from loraplex.engines.protocol import Adapter, EmbedRequest, WeightedAdapter

ADAPTER = Adapter(id="sha-ab", name="ab", path="")  # the sum of its bytes: 97 + 98


async def started(max_model_len: int = 64) -> EchoEngine:
    engine = EchoEngine(Settings(model=Model(path="", name="echo", max_model_len=max_model_len)))
    await engine.start(lambda progress: None)
    return engine


def wanted(text: str, **options: object) -> EmbedRequest:
    return EmbedRequest(request_id="r", prompt_token_ids=tuple(text.encode()), **options)  # type: ignore[arg-type]


async def test_embedding_is_the_bits_of_the_bytes_pooled_as_asked_for() -> None:
    engine = await started()
    bits = {"A": (1, 0, 0, 0, 0, 0, 1, 0), "C": (1, 1, 0, 0, 0, 0, 1, 0)}
    for pooling, expected in {"cls": bits["A"], "last": bits["C"], "mean": (1, 0.5, 0, 0, 0, 0, 1, 0)}.items():
        found = await engine.embed(wanted("AC", pooling=pooling, normalize=False))
        assert found.values == (*expected, 0)
    assert engine.info().embedding_width == 9
    normalised = await engine.embed(wanted("A"))
    assert normalised.values == pytest.approx([1 / math.sqrt(2), 0, 0, 0, 0, 0, 1 / math.sqrt(2), 0, 0])
    assert (await engine.embed(wanted("\0"))).values == (0.0,) * 9


async def test_embedding_tells_the_adapter_and_a_composition_their_weights() -> None:
    engine = await started()
    assert (await engine.embed(wanted("A", normalize=False, adapter=ADAPTER))).values[-1] == 195
    composition = (WeightedAdapter(ADAPTER, 0.5), WeightedAdapter(Adapter(id="sha-c", name="c", path=""), 2.0))
    assert (await engine.embed(wanted("A", normalize=False, composition=composition))).values[-1] == 97.5 + 2 * 99
    assert [found.adapter_id for found in await engine.residency()] == ["sha-ab", "sha-c"]


async def test_embedding_fails_as_a_generation_would() -> None:
    engine = await started(max_model_len=8)
    with pytest.raises(PromptTooLong, match="the prompt has 9 tokens; at most 8 fit"):
        await engine.embed(wanted("123456789"))
    with pytest.raises(InvalidRequest, match="no tokens"):
        await engine.embed(wanted(""))
    with pytest.raises(GenerationFailed):
        await engine.embed(wanted("<fail>"))
    with pytest.raises(EngineDied):
        await engine.embed(wanted("<die>"))
    slow = asyncio.create_task(engine.embed(wanted("<slow>")))
    await asyncio.sleep(0)
    assert (await engine.stats()).num_running == 1
    slow.cancel()
    with pytest.raises(asyncio.CancelledError):
        await slow
    stats = await engine.stats()
    assert (stats.num_running, stats.total_failed, stats.total_aborted) == (0, 1, 2)
    await engine.close()
    with pytest.raises(EngineUnavailable):
        await engine.embed(wanted("A"))
