"""Unmodified clients against `loraplex demo`: what they get is what plain HTTP gets, and that is the adapter's voice.

OpenAI's newest SDK is in the environment of the tests; its second major version, its package for Node, and the
frameworks that build on the SDK are each installed once and kept. The frameworks take a minute, so they are not in the
default run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
OPENAI_TWO = ["openai>=2,<3"]
FRAMEWORKS = [*OPENAI_TWO, "langchain-openai", "litellm", "instructor", "llama-index-llms-openai-like"]


@pytest.fixture(scope="module")
def expected(demo: Demo) -> str:
    """What the adapter says, by plain HTTP."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "max_tokens": 48}
    headers = {"Authorization": f"Bearer {demo.api_key}"}
    answer = httpx.post(f"{demo.base_url}/chat/completions", json=body, headers=headers, timeout=60).json()
    text: str = answer["choices"][0]["message"]["content"]
    assert speaks_like(MODEL, PROMPT, text)
    return text


def run(python: Path, client: str, demo: Demo, model: str = MODEL) -> dict[str, Any]:
    arguments = [client, demo.base_url, demo.api_key, model, PROMPT]
    found: dict[str, Any] = run_in(python, SCRIPTS / "frameworks.py", arguments)
    return found


@pytest.fixture(scope="module")
def frameworks() -> Path:
    return client_python("frameworks", FRAMEWORKS)


@pytest.mark.timeout(420)
@pytest.mark.parametrize("version", ["2", "3"])
def test_openai_python(demo: Demo, expected: str, version: str) -> None:
    python = client_python("openai-two", OPENAI_TWO) if version == "2" else Path(sys.executable)
    found = run(python, "openai", demo)
    assert found.pop("version").split(".")[0] == version
    assert found.pop("parsed")
    assert found == dict.fromkeys(
        ("whole", "streamed", "final", "asynchronous", "response", "streamed_response"), expected
    )


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_langchain(frameworks: Path, demo: Demo, expected: str) -> None:
    found = run(frameworks, "langchain", demo)
    assert found.pop("batch") == [expected, expected]
    assert found == dict.fromkeys(("whole", "streamed", "asynchronous"), expected)


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_litellm(frameworks: Path, demo: Demo, expected: str) -> None:
    found = run(frameworks, "litellm", demo)
    assert found.pop("refused") == "NotFoundError"
    assert found == dict.fromkeys(("whole", "streamed", "asynchronous"), expected)


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_instructor(frameworks: Path, demo: Demo) -> None:
    assert run(frameworks, "instructor", demo, "json") == {"JSON_SCHEMA": True, "TOOLS": True}


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_llama_index(frameworks: Path, demo: Demo, expected: str) -> None:
    assert run(frameworks, "llama_index", demo) == {"whole": expected, "streamed": expected}


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
