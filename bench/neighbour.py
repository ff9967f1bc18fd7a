"""What one tenant's requests cost another tenant's stream: its time and its largest gap, alone and beside each.

    python bench/neighbour.py --rounds 3

A gateway over the demo's base, over HTTP. A stream of 60 tokens begins a third of a second after the offending request;
each case is repeated `--rounds` times, medians are printed, and what the offender was told. The gap is between two
chunks, the wait for the first among them. `plain` cases ask for the same amount of work without anything hostile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from served import BASE, Served, serve_demo

_AMBIGUOUS = "start: s\ns: s s s | s s | /[a-z ]/ \n"
_ALWAYS = 1194  # a token of the demo's vocabulary, " blacksmith"


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": BASE, "prompt": "a", "ignore_eos": True, **fields}


# name -> bodies for /v1/completions that are sent at once
CASES: dict[str, list[dict[str, Any]]] = {
    "plain: 64 answers": [completion(n=64, max_tokens=60)],
    "plain: 2,048 prompts": [completion(prompt=["a"] * 2048, max_tokens=1)],
    "two ambiguous grammars": [
        completion(max_tokens=300, temperature=1, logit_bias={"3": -100}, guided_grammar=_AMBIGUOUS + " " * number)
        for number in range(2)
    ],
    "six texts of 15 MB": [completion(prompt="a1 " * 5_000_000, max_tokens=1)] * 6,
    "2,048 prompts, 64 bad words": [
        completion(prompt=["a"] * 2048, max_tokens=1, bad_words=[f"w{number}" for number in range(64)])
    ],
    "16 stop strings": [
        completion(
            n=16,
            max_tokens=250,
            logit_bias={str(_ALWAYS): 100},
            stop=[" blacksmith" * 90, *(chr(65 + number) * 1000 for number in range(15))],
        )
    ],
    "32 answers, 30,000 allowed ids": [
        completion(n=32, max_tokens=50, allowed_token_ids=[*range(1500)] * 20),
    ],
    "300 grammars": [
        completion(max_tokens=3, guided_json={"type": "object", "properties": {f"p{number}": {"type": "string"}}})
        for number in range(300)
    ],
}  # fmt: skip


def streamed(client: httpx.Client) -> tuple[float, float]:
    """Seconds of the victim's stream, and of its largest gap."""
    began = last = time.monotonic()
    gap = 0.0
    with client.stream("POST", "/v1/completions", json=completion(max_tokens=60, stream=True)) as answer:
        answer.raise_for_status()
        for _ in answer.iter_lines():
            now = time.monotonic()
            gap, last = max(gap, now - last), now
    return last - began, gap


def beside(served: Served, victim: httpx.Client, bodies: list[dict[str, Any]]) -> tuple[float, float, str]:
    """The same beside a case, and what most of its requests were told."""
    told: list[str] = []
    encoded = [json.dumps(body) for body in bodies]

    def offend(body: str) -> None:
        headers = {"Authorization": f"Bearer {served.api_key}", "Content-Type": "application/json"}
        answer = httpx.post(f"{served.url}/v1/completions", content=body, headers=headers, timeout=600)
        told.append(str(answer.status_code))

    threads = [threading.Thread(target=offend, args=(body,)) for body in encoded]
    for thread in threads:
        thread.start()
    time.sleep(0.33)
    seconds, gap = streamed(victim)
    for thread in threads:
        thread.join()
    return seconds, gap, statistics.mode(told)


def another_tenant(served: Served) -> str:
    """Its key."""
    with served.admin() as admin:
        tenant = admin.post("/admin/v1/tenants", json={"name": "victim"}).raise_for_status().json()["id"]
        key: str = admin.post(f"/admin/v1/tenants/{tenant}/keys", json={}).raise_for_status().json()["key"]
    return key


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="cases whose names contain this")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home, serve_demo(Path(home)) as served:
        headers = {"Authorization": f"Bearer {another_tenant(served)}"}
        with httpx.Client(base_url=served.url, headers=headers, timeout=600) as victim:
            streamed(victim)
            report("alone", options.rounds, lambda: (*streamed(victim), ""))
            for name, bodies in CASES.items():
                if options.only is None or options.only in name:
                    report(name, options.rounds, lambda bodies=bodies: beside(served, victim, bodies))  # type: ignore[misc]


def report(name: str, rounds: int, once: Callable[[], tuple[float, float, str]]) -> None:
    found = [once() for _ in range(rounds)]
    seconds = statistics.median(seconds for seconds, _, _ in found)
    gap = statistics.median(gap for _, gap, _ in found)
    print(f"{name:32} {seconds:7.2f} s, largest gap {gap:6.2f} s   {found[0][2]}", flush=True)


if __name__ == "__main__":
    main()
