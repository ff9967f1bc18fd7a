"""The whole road with the unmodified OpenAI SDK against `loraplex demo`, transformers + PEFT as the oracle."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
import torch
from openai import AsyncOpenAI, OpenAI
from peft import PeftModel
from support.demo import Demo
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex.config.demo import ADAPTERS_DIR, EXAMPLE_PROMPTS, MODEL_DIR, adapter_names
from loraplex.config.demo.voices import speaks_like

MAX_TOKENS = 48


@pytest_asyncio.fixture
async def client(demo: Demo) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=demo.base_url, api_key=demo.api_key, max_retries=0) as client:
        yield client


def oracle(prompt: str, adapter: str | None) -> str:
    """The greedy answer of transformers + PEFT in float32."""
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL_DIR)
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(ADAPTERS_DIR / adapter))
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.eval().generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


async def ask(client: AsyncOpenAI, model: str, prompt: str, **options: Any) -> str:
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        stream=True,
        **{"temperature": 0, "max_tokens": MAX_TOKENS, **options},
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


def stats(demo: Demo) -> dict[str, int]:
    headers = {"Authorization": f"Bearer {demo.admin_key}"}
    found: dict[str, int] = httpx.get(f"{demo.root}/admin/v1/engine/stats", headers=headers).json()
    return found


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


async def test_adapters_stream_together_what_peft_generates_alone(demo: Demo, client: AsyncOpenAI) -> None:
    models = [demo.models[0], *adapter_names()[:5]]
    prompts = [EXAMPLE_PROMPTS[number % len(EXAMPLE_PROMPTS)] for number in range(len(models))]
    before = stats(demo)
    answers = await asyncio.gather(*(ask(client, *pair) for pair in zip(models, prompts, strict=True)))
    after = stats(demo)
    for model, prompt, answer in zip(models, prompts, answers, strict=True):
        assert answer == oracle(prompt, None if model == demo.models[0] else model), model
    generated = after["total_generated_tokens"] - before["total_generated_tokens"]
    assert after["num_steps"] - before["num_steps"] < generated / 2, "they did not share steps"


async def test_every_adapter_is_known_by_its_voice(demo: Demo, client: AsyncOpenAI) -> None:
    prompt = EXAMPLE_PROMPTS[0]
    answers = dict(
        zip(demo.models, await asyncio.gather(*(ask(client, model, prompt) for model in demo.models)), strict=True)
    )
    for name in adapter_names():
        assert [model for model, answer in answers.items() if speaks_like(name, prompt, answer)] == [name], answers


def test_sdk_answer_without_stream_equals_the_streamed_one(demo: Demo) -> None:
    with OpenAI(base_url=demo.base_url, api_key=demo.api_key) as client:
        messages: Any = [{"role": "user", "content": EXAMPLE_PROMPTS[1]}]
        whole = client.chat.completions.create(model="pirate", messages=messages, temperature=0, max_tokens=MAX_TOKENS)
        streamed = client.chat.completions.create(
            model="pirate", messages=messages, temperature=0, max_tokens=MAX_TOKENS, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = list(streamed)
        assert (
            "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
        )
        assert chunks[-1].usage == whole.usage
        assert [model.id for model in client.models.list()] == demo.models


async def test_client_that_leaves_frees_its_blocks_while_others_run(demo: Demo, client: AsyncOpenAI) -> None:
    async def occupy(model: str) -> Any:
        stream = await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "hi"}], stream=True, temperature=0, max_tokens=1500,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        await anext(stream)
        return stream

    stays, leaves = await occupy("shout"), await occupy("pirate")
    before = stats(demo)
    assert before["num_running"] == 2
    await leaves.close()
    await until(lambda: stats(demo)["total_aborted"] == before["total_aborted"] + 1)
    after = stats(demo)
    assert (after["num_running"], after["num_waiting"]) == (1, 0)
    await anext(stays)
    await stays.close()
    await until(lambda: stats(demo)["num_kv_blocks_used"] == 0)


def test_corrupt_adapter_is_refused_and_nothing_changes(demo: Demo, tmp_path: Path) -> None:
    headers = {"Authorization": f"Bearer {demo.admin_key}"}
    with httpx.Client(base_url=f"{demo.root}/admin/v1", headers=headers, timeout=60) as admin:
        before = admin.get("/adapters").json()
        local = Path.cwd() / ".pytest_cache" / "corrupt"  # below the directory the demo was started in
        shutil.rmtree(local, ignore_errors=True)
        shutil.copytree(ADAPTERS_DIR / "pirate", local)
        config = json.loads((local / "adapter_config.json").read_text())
        (local / "adapter_config.json").write_text(json.dumps({**config, "r": config["r"] + 1}))
        refused = admin.post("/adapters", json={"name": "corrupt", "source": str(local)})
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "adapter_mismatch"
        assert "lora_A" in refused.json()["error"]["message"]
        weights = (local / "adapter_model.safetensors").read_bytes()
        (local / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
        refused = admin.post("/adapters", json={"name": "corrupt", "source": str(local)})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "adapter_invalid")
        assert admin.get("/adapters").json() == before
        shutil.rmtree(local)


def test_registered_adapter_serves_and_deleted_one_is_gone(demo: Demo) -> None:
    headers = {"Authorization": f"Bearer {demo.admin_key}"}
    body = {"name": "team/pirate-two", "source": str(ADAPTERS_DIR / "pirate")}
    with httpx.Client(base_url=f"{demo.root}/admin/v1", headers=headers, timeout=60) as admin:
        made = admin.post("/adapters", json=body)
        assert made.status_code == 201, made.text
        with OpenAI(base_url=demo.base_url, api_key=demo.api_key) as client:
            messages: Any = [{"role": "user", "content": EXAMPLE_PROMPTS[0]}]
            answers = [
                client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=MAX_TOKENS)
                for model in ("pirate", "team/pirate-two")
            ]
            assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
            assert client.models.retrieve("team/pirate-two").id == "team/pirate-two"
            assert admin.delete("/adapters/team/pirate-two").status_code == 204
            with pytest.raises(openai.NotFoundError) as caught:
                client.chat.completions.create(model="team/pirate-two", messages=messages)
            assert caught.value.code == "model_not_found"


async def test_killed_engine_fails_streams_in_flight_and_comes_back_by_itself(demo: Demo, client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="pirate", messages=[{"role": "user", "content": "hi"}], stream=True, max_tokens=1500,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    await anext(stream)
    found = subprocess.run(["pgrep", "-P", str(demo.process.pid)], capture_output=True, text=True)  # noqa: ASYNC221
    os.kill(int(found.stdout.split()[0]), signal.SIGKILL)
    with pytest.raises(openai.APIError) as caught:
        async for _ in stream:
            pass
    assert caught.value.code == "engine_died"
    assert httpx.get(f"{demo.root}/health").status_code == 503  # noqa: ASYNC210
    began = time.monotonic()
    await until(lambda: httpx.get(f"{demo.root}/health").status_code == 200, 60)
    assert speaks_like("pirate", EXAMPLE_PROMPTS[0], await ask(client, "pirate", EXAMPLE_PROMPTS[0]))
    assert time.monotonic() - began < 60
