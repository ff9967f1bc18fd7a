"""What a checkpoint may look like: in shards, with tied embeddings, with recommendations, or a shape alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.core import request, run, tokens
from support.models import Oracle, llama_config, make_model

from loraplex.config.settings import Adapters, EngineSettings, Model, Settings
from loraplex.engines.errors import ModelNotServable
from loraplex.engines.native.core import EngineCore
from loraplex.engines.native.defaults import sampling_defaults
from loraplex.engines.native.engine import NativeEngine
from loraplex.engines.native.loading import load_machine
from loraplex.engines.protocol import SamplingDefaults
from loraplex.engines.tokenizer_protocol import ChatMessage

PROMPT = list(range(40, 60))


def settings(path: Path, **model: Any) -> Settings:
    return Settings(
        model=Model(path=str(path), name="small", device="cpu", **model),
        engine=EngineSettings(num_threads=1, kv_cache_bytes=2**20),
        adapters=Adapters(device_bytes=2**20),
    )


@pytest.mark.parametrize(("options", "max_shard_size"), [({}, "100KB"), ({"tie_word_embeddings": True}, "1GB")])
def test_sharded_and_tied_checkpoints_are_read_whole(
    options: dict[str, Any], max_shard_size: str, tmp_path: Path
) -> None:
    model: Any = make_model(llama_config(**options), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    num_files = len(list(tmp_path.glob("*.safetensors")))
    assert num_files == 1 if options else num_files > 3
    core = EngineCore(load_machine(settings(tmp_path), lambda progress: None))
    core.submit(request("r", PROMPT))
    assert tokens(run(core)["r"]) == Oracle(tmp_path).greedy(PROMPT, 12, None)


def test_missing_shard_is_refused_with_its_name(tmp_path: Path) -> None:
    model: Any = make_model(llama_config(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ModelNotServable, match=re.escape(lost.name)):
        load_machine(settings(tmp_path), lambda progress: None)


def test_recommendations_and_several_ends_are_taken_from_generation_config(tmp_path: Path) -> None:
    make_model(llama_config(), tmp_path)
    said = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True, "eos_token_id": [257, 9], "min_p": None}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    machine = load_machine(settings(tmp_path), lambda progress: None)
    assert machine.info.sampling_defaults == SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20)
    assert machine.eos_token_ids == {257, 9}
    aside = load_machine(settings(tmp_path, generation_config="none"), lambda progress: None)
    assert aside.info.sampling_defaults == SamplingDefaults()


@pytest.mark.parametrize(("said", "says"), [
    ('{"top_p": 1.5}', "top_p = 1.5 is not valid"), ('{"temperature": "hot"}', "Expected `float`, got `str`"),
    ('{"top_k": -1}', "top_k = -1 is not valid"), ("[1]", "generation_config.json"), ("{", "generation_config.json"),
])  # fmt: skip
def test_recommendations_that_are_none_are_refused_with_the_setting_that_leaves_them_aside(
    said: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / "generation_config.json").write_text(said)
    with pytest.raises(ModelNotServable, match=re.escape(says)) as caught:
        sampling_defaults(tmp_path)
    assert "model.generation_config = 'none'" in str(caught.value)


async def test_random_weights_serve_a_shape_with_a_tokenizer_that_stands_in(tmp_path: Path) -> None:
    llama_config(dtype="bfloat16").save_pretrained(tmp_path)
    engine = NativeEngine(settings(tmp_path, random_weights=True))
    info = await engine.start(lambda progress: None)
    try:
        assert (info.dtype, info.vocab_size) == ("bfloat16", 320)
        prompt = engine.tokenizer.encode_chat([ChatMessage(role="user", content="w5 w319")])
        assert prompt == [5, 319]
        wanted = request("r", prompt, max_tokens=5, ignore_eos=True)
        events = [event async for event in engine.generate(wanted)]
        assert sum(len(event.token_ids) for event in events) == 5
        assert len("".join(event.text for event in events).split()) == 5
    finally:
        await engine.close()


def test_shape_alone_is_refused_where_random_weights_were_not_asked_for(tmp_path: Path) -> None:
    llama_config().save_pretrained(tmp_path)
    with pytest.raises(ModelNotServable, match="safetensors"):
        load_machine(settings(tmp_path), lambda progress: None)
