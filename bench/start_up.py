"""From the command line to the first token: `loraplex demo`, asked for one token as soon as it listens.

    python bench/start_up.py --rounds 5

Each round starts a gateway with its own engine on a free port, waits for the line that names the address and a key,
and streams one chat completion through the official SDK. Files are in the page cache after the first round, which is
not counted. Prints medians in seconds: until the line, and until the first token.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from openai import OpenAI

LORAPLEX = Path(sys.executable).with_name("loraplex")


def start_and_ask() -> tuple[float, float]:
    """Seconds until the gateway listens and until its first token. Raises RuntimeError if it ends before."""
    began = time.perf_counter()
    command = [str(LORAPLEX), "demo", "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"loraplex demo ended with status {process.wait()}")
        told, listens = json.loads(line), time.perf_counter() - began
        with OpenAI(base_url=told["base_url"], api_key=told["api_key"]) as client:
            model = client.models.list().data[0].id
            stream = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "Hello"}], max_tokens=1, stream=True
            )
            first = next(iter(chunk for chunk in stream if chunk.choices and chunk.choices[0].delta.content))
        seconds = time.perf_counter() - began
        assert first
        process.send_signal(signal.SIGTERM)
        process.wait()
    return listens, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    figures = [start_and_ask() for _ in range(options.rounds + 1)][1:]
    listens, first_token = (statistics.median(column) for column in zip(*figures, strict=True))
    print(f"listens after {listens:.2f} s, first token after {first_token:.2f} s (medians of {options.rounds})")


if __name__ == "__main__":
    main()
