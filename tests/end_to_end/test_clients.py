"""Unmodified clients against `loraplex demo`: what they get is what plain HTTP gets, and that is the adapter's voice.

Those that need an older OpenAI SDK share one environment; OpenAI's package for Node has a directory of its own. Both
are installed once and kept; that takes a minute or more, so these are not in the default run.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.client_venvs import client_python, node_package, run_in
from support.demo import Demo

from loraplex.config.demo import EXAMPLE_PROMPTS
from loraplex.config.demo.voices import speaks_like

MODEL = "pirate"
PROMPT = EXAMPLE_PROMPTS[0]
SCRIPTS = Path(__file__).parent / "clients"
FRAMEWORKS = ["openai>=2,<3", "langchain-openai", "litellm", "instructor", "llama-index-llms-openai-like"]


@pytest.fixture(scope="module")
def expected(demo: Demo) -> str:
    """What the adapter says, by plain HTTP."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "max_tokens": 48}
    headers = {"Authorization": f"Bearer {demo.api_key}"}
    answer = httpx.post(f"{demo.base_url}/chat/completions", json=body, headers=headers, timeout=60).json()
    text: str = answer["choices"][0]["message"]["content"]
    assert speaks_like(MODEL, PROMPT, text)
    return text


def run(client: str, demo: Demo, model: str = MODEL) -> dict[str, Any]:
    python = client_python("frameworks", FRAMEWORKS)
    arguments = [client, demo.base_url, demo.api_key, model, PROMPT]
    found: dict[str, Any] = run_in(python, SCRIPTS / "frameworks.py", arguments)
    return found


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_openai_python_two(demo: Demo, expected: str) -> None:
    found = run("openai_two", demo)
    assert found.pop("version").startswith("2.")
    assert found.pop("parsed")
    assert found == dict.fromkeys(
        ("whole", "streamed", "final", "asynchronous", "response", "streamed_response"), expected
    )


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_langchain(demo: Demo, expected: str) -> None:
    found = run("langchain", demo)
    assert found.pop("batch") == [expected, expected]
    assert found == dict.fromkeys(("whole", "streamed", "asynchronous"), expected)


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_litellm(demo: Demo, expected: str) -> None:
    found = run("litellm", demo)
    assert found.pop("refused") == "NotFoundError"
    assert found == dict.fromkeys(("whole", "streamed", "asynchronous"), expected)


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_instructor(demo: Demo) -> None:
    assert run("instructor", demo, "json") == {"JSON_SCHEMA": True, "TOOLS": True}


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_llama_index(demo: Demo, expected: str) -> None:
    assert run("llama_index", demo) == {"whole": expected, "streamed": expected}


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_openai_node(demo: Demo, expected: str) -> None:
    entry = node_package("openai") / "index.mjs"
    command = ["node", str(SCRIPTS / "node.mjs"), str(entry), demo.base_url, demo.api_key, MODEL, PROMPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env={"PATH": os.environ["PATH"]})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("models") == demo.models
    assert found.pop("refused") == "model_not_found"
    assert found == dict.fromkeys(("whole", "streamed", "helper", "response", "batched"), expected)
