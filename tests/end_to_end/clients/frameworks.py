"""Runs where the clients are installed: `frameworks.py CLIENT URL KEY MODEL PROMPT`; prints what it got, as JSON.

Each client gives {"whole": text, "streamed": text} and what else it is known for.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal

LIMIT = 48


def openai(url: str, key: str, model: str, prompt: str) -> dict[str, Any]:
    import openai as client_package
    from openai import AsyncOpenAI, OpenAI
    from pydantic import BaseModel

    messages: Any = [{"role": "user", "content": prompt}]
    options: Any = {"model": model, "messages": messages, "temperature": 0, "max_tokens": LIMIT}

    class Answer(BaseModel):
        colour: Literal["red", "blue"]

    async def asynchronous() -> str:
        async with AsyncOpenAI(base_url=url, api_key=key) as client:
            return (await client.chat.completions.create(**options)).choices[0].message.content or ""

    with OpenAI(base_url=url, api_key=key) as client:
        whole = client.chat.completions.create(**options).choices[0].message.content
        with client.chat.completions.stream(**options) as stream:
            deltas = "".join(event.delta for event in stream if event.type == "content.delta")
            final = stream.get_final_completion().choices[0].message.content
        parsed = client.chat.completions.parse(model=model, messages=messages, response_format=Answer, temperature=0)
        response = client.responses.create(model=model, input=prompt, temperature=0, max_output_tokens=LIMIT)
        with client.responses.stream(model=model, input=prompt, temperature=0, max_output_tokens=LIMIT) as events:
            for _ in events:
                pass
            streamed_response = events.get_final_response().output_text
        return {
            "version": client_package.__version__,
            "whole": whole,
            "streamed": deltas,
            "final": final,
            "asynchronous": asyncio.run(asynchronous()),
            "parsed": isinstance(parsed.choices[0].message.parsed, Answer),
            "response": response.output_text,
            "streamed_response": streamed_response,
        }


def langchain(url: str, key: str, model: str, prompt: str) -> dict[str, Any]:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=url, api_key=key, model=model, temperature=0, max_tokens=LIMIT)
    return {
        "whole": chat.invoke(prompt).content,
        "streamed": "".join(str(chunk.content) for chunk in chat.stream(prompt)),
        "asynchronous": asyncio.run(chat.ainvoke(prompt)).content,
        "batch": [answer.content for answer in chat.batch([prompt, prompt])],
    }


def litellm(url: str, key: str, model: str, prompt: str) -> dict[str, Any]:
    import litellm as client

    options: Any = {"model": f"openai/{model}", "api_base": url, "api_key": key, "temperature": 0, "max_tokens": LIMIT,
                    "messages": [{"role": "user", "content": prompt}]}  # fmt: skip
    whole = client.completion(**options)
    streamed = client.completion(**options, stream=True)
    try:
        client.completion(**{**options, "model": "openai/nobody"})
        refused = "nothing"
    except client.NotFoundError:
        refused = "NotFoundError"
    return {
        "whole": whole.choices[0].message.content,
        "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in streamed),
        "asynchronous": asyncio.run(client.acompletion(**options)).choices[0].message.content,
        "refused": refused,
    }


def instructor(url: str, key: str, model: str, prompt: str) -> dict[str, Any]:
    import instructor as client
    from openai import OpenAI
    from pydantic import BaseModel, Field

    class Person(BaseModel):  # of bounded length: the demo's model rarely thinks of ending a string or a number
        name: Literal["Anna", "Ben"]
        age: Annotated[int, Field(ge=0, le=99)]

    found = {}
    for mode in (client.Mode.JSON_SCHEMA, client.Mode.TOOLS):
        chat = client.from_openai(OpenAI(base_url=url, api_key=key), mode=mode)
        person = chat.chat.completions.create(
            model=model, response_model=Person, temperature=0, max_tokens=200, max_retries=0,
            messages=[{"role": "user", "content": prompt}],
        )  # fmt: skip
        found[mode.name] = isinstance(person, Person)
    return found


def llama_index(url: str, key: str, model: str, prompt: str) -> dict[str, Any]:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    chat = OpenAILike(model=model, api_base=url, api_key=key, is_chat_model=True, temperature=0, max_tokens=LIMIT)
    messages = [ChatMessage(role="user", content=prompt)]
    return {
        "whole": chat.chat(messages).message.content,
        "streamed": "".join(part.delta or "" for part in chat.stream_chat(messages)),
    }


CLIENTS: dict[str, Callable[[str, str, str, str], dict[str, Any]]] = {
    "openai": openai,
    "langchain": langchain,
    "litellm": litellm,
    "instructor": instructor,
    "llama_index": llama_index,
}

if __name__ == "__main__":
    print(json.dumps(CLIENTS[sys.argv[1]](*sys.argv[2:6])))
