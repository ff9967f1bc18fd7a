"""What a step or a request costs as each thing grows, as a table and a plot: none may cost more than in proportion.

    python bench/growth.py --plot docs/growth.svg      # --axes rank,context for some of them, --keep to add to others

  adapters active       256 rows of one step, dealt to so many adapters of rank 16
  rank                  8 rows over 4 adapters of that rank
  context               4 rows with so many tokens before them
  concurrency           so many rows on the base alone
  adapters registered   a request through the gateway to one of so many names
  tenants               a request through the gateway from each of so many tenants in turn

The first four are the engine alone on the toy shape: milliseconds of a decode step, drafting off. The last two are the
echo engine behind a gateway in this process: milliseconds of a short answer that is not streamed. Medians; the points
of an axis are measured in turns, `--rounds` times. The exponent is the slope between the first and the last point in
logarithms: 1 is growth in proportion, 0 none.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import itertools
import json
import math
import os
import random
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import served  # noqa: F401  it lets `support` be found
from shapes import SHAPES, make_adapter, make_base
from support.gateway import BASE, Gateway, running, settings_in, write_adapter

from loraplex.config.settings import Adapters, EngineSettings, Model, Settings
from loraplex.engines.native.core import EngineCore
from loraplex.engines.native.loading import load_machine
from loraplex.engines.protocol import Adapter, GenerateRequest, SamplingParams

SHAPE = "toy"
AXES = {
    "adapters active": (1, 4, 16, 64, 256),
    "rank": (4, 8, 16, 32, 64, 128, 256),
    "context": (128, 512, 2048, 8000),
    "concurrency": (1, 4, 16, 64, 256),
    "adapters registered": (1, 10, 100, 1000, 10000),
    "tenants": (1, 10, 100, 1000),
}
BEHIND_A_GATEWAY = ("adapters registered", "tenants")
INK, FAINT, LINE = "#111827", "#6b7280", "#d1d5db"


class EngineBench:
    """One core; prompts are random, so that no prefix is found."""

    def __init__(self, models: Path) -> None:
        self._models = models
        settings = Settings(
            model=Model(path=str(make_base(SHAPE, models)), name=SHAPE),
            engine=EngineSettings(kv_cache_bytes=2**30, max_running=256, max_batch_tokens=512, max_draft_tokens=0),
            adapters=Adapters(device_bytes=4 * 2**30, host_bytes=4 * 2**30),
        )
        self._core = EngineCore(load_machine(settings, lambda progress: None))
        self._chance = random.Random(0)
        self._numbers = itertools.count()

    def step_ms(self, axis: str, size: int, num_steps: int) -> float:
        """Of decode steps, the median."""
        match axis:
            case "adapters active":
                return self._decode(256, [self._adapter(16, number) for number in range(size)], 16, num_steps)
            case "rank":
                return self._decode(8, [self._adapter(size, number) for number in range(4)], 16, num_steps)
            case "context":
                return self._decode(4, [None], size, num_steps)
            case _:
                return self._decode(size, [None], 16, num_steps)

    def _adapter(self, rank: int, number: int) -> Adapter:
        return make_adapter(SHAPE, rank, number, self._models)

    def _decode(self, num_rows: int, adapters: list[Adapter] | list[None], num_prompt: int, num_steps: int) -> float:
        core, names = self._core, []
        sampling = SamplingParams(max_tokens=8192 - num_prompt - 1, temperature=0.0, ignore_eos=True)
        for row in range(num_rows):
            names.append(str(next(self._numbers)))
            prompt = tuple(self._chance.randrange(10, SHAPES[SHAPE].vocab) for _ in range(num_prompt))
            adapter = adapters[row % len(adapters)]
            core.submit(
                GenerateRequest(request_id=names[-1], prompt_token_ids=prompt, sampling=sampling, adapter=adapter)
            )
        while sum(emission.sampled is not None for emission in core.step()) < num_rows:
            # until every prompt is computed, and every row is in each step
            assert core.stats().total_preemptions == 0, "the KV cache is too small"
        took = []
        for _ in range(num_steps):
            began = time.perf_counter()
            emissions = core.step()
            took.append((time.perf_counter() - began) * 1e3)
            assert sum(emission.sampled is not None for emission in emissions) == num_rows
        for name in names:
            core.end(name, aborted=True)
        return statistics.median(took)


def ask(gateway: Gateway, asked: Iterator[tuple[str, str]], number: int) -> float:
    """Milliseconds of so many requests, the median; `asked` gives a key and a model for each."""
    connection = http.client.HTTPConnection(urlsplit(gateway.url).netloc)
    took = []
    for key, model in itertools.islice(asked, number):
        body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1})
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        began = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", body, headers)
        answer = connection.getresponse()
        told = answer.read()
        took.append((time.perf_counter() - began) * 1e3)
        assert answer.status == 200, told
    connection.close()
    return statistics.median(took)


class GatewayBench:
    """One gateway with so many adapters registered, or so many tenants."""

    def __init__(self, axis: str, size: int, stack: ExitStack) -> None:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loraplex-growth-")))
        os.environ["LORAPLEX_TEST_ADMIN_KEY"] = "bench-admin-key"
        self._gateway = stack.enter_context(running(settings_in(home), "bench-admin-key"))
        chance = random.Random(0)
        if axis == "tenants":
            keys = [self._gateway.new_tenant(f"tenant-{number}")[1] for number in range(size)]
            self._asked: Iterator[tuple[str, str]] = ((key, BASE) for key in itertools.cycle(keys))
            return
        source = str(write_adapter(home / "local" / "adapter"))
        with self._gateway.admin() as admin:
            admin.post("/admin/v1/adapters", json={"name": "adapter-0", "source": source}).raise_for_status()
        _copy_registration(home / "loraplex.db", size)
        catalogue = self._gateway.services.catalogue
        asyncio.run_coroutine_threadsafe(catalogue.reload(), self._gateway.loop).result()
        _, key = self._gateway.new_tenant("tenant")
        self._asked = ((key, f"adapter-{chance.randrange(size)}") for _ in itertools.count())

    def request_ms(self, num_requests: int) -> float:
        return ask(self._gateway, self._asked, num_requests)


def _copy_registration(database: Path, size: int) -> None:
    """So many names for what `adapter-0` is registered as: thousands through the admin routes would take minutes."""
    with sqlite3.connect(database) as connection:
        for table in ("adapters", "adapter_versions"):
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            values = ["'adapter-' || copy" if column == "name" else column for column in columns]
            connection.execute(
                "WITH RECURSIVE copies(copy) AS (VALUES (1) UNION ALL SELECT copy + 1 FROM copies LIMIT ?) "
                f"INSERT INTO {table} ({', '.join(columns)}) "
                f"SELECT {', '.join(values)} FROM {table}, copies WHERE name = 'adapter-0' AND copy < ?",
                (size, size),
            )
    connection.close()


def measure(axis: str, options: argparse.Namespace) -> dict[int, float]:
    """Milliseconds by size."""
    found: dict[int, list[float]] = {size: [] for size in AXES[axis]}
    with ExitStack() as stack:
        point: dict[int, Callable[[], float]] = {}
        if axis in BEHIND_A_GATEWAY:
            for size in AXES[axis]:
                gateway = GatewayBench(axis, size, stack)
                point[size] = partial(gateway.request_ms, options.requests)
        else:
            engine = EngineBench(options.models)
            for size in AXES[axis]:
                point[size] = partial(engine.step_ms, axis, size, options.steps)
        for round_number in range(options.rounds + 1):
            for size, one in point.items():
                figure = one()
                if round_number:  # the first one warms up
                    found[size].append(figure)
    return {size: statistics.median(figures) for size, figures in found.items()}


def exponent(figures: dict[int, float]) -> float:
    """The slope from the first to the last point, in logarithms."""
    (first, small), *_, (last, large) = figures.items()
    return math.log(large / small) / math.log(last / first)


def plot(results: dict[str, dict[int, float]], path: Path) -> None:
    """Each axis as a small plot of its own, with growth in proportion to the first point as a dashed line."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # the same figures give the same file
    pyplot.rcParams.update({"svg.hashsalt": "loraplex", "font.size": 9, "text.color": INK, "axes.edgecolor": LINE})
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15)
    figure, plots = pyplot.subplots(2, 3, figsize=(11, 6.6), layout=layout)
    for place in plots.flat[len(results) :]:
        place.remove()
    for place, (axis, found) in zip(plots.flat, results.items(), strict=False):
        _plot_axis(place, axis, found)
    figure.supxlabel("grey: where a cost would grow faster than in proportion", fontsize=9, color=FAINT)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _plot_axis(place: Any, axis: str, found: dict[int, float]) -> None:
    """In logarithms, `place` being matplotlib's axes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    sizes, times = list(found), list(found.values())
    low, high = min(times) / 2.5, max(times) * 2.5
    in_proportion = [times[0] * size / sizes[0] for size in sizes]
    place.loglog(sizes, in_proportion, "--", color="#9ca3af", linewidth=1)
    place.fill_between(sizes, in_proportion, max(high, *in_proportion), color="#f3f4f6", linewidth=0)
    place.loglog(sizes, times, "o-", color="#2563eb", linewidth=2, markersize=5, markeredgecolor="white")
    for end, shift, side in ((0, (3, -14), "left"), (-1, (4, 8), "right")):
        place.annotate(f"{times[end]:.3g} ms", (sizes[end], times[end]), shift, textcoords="offset points",
                       ha=side, color="#1d4ed8")  # fmt: skip
    what = "a request" if axis in BEHIND_A_GATEWAY else "a step"
    place.set_title(axis, loc="left", fontsize=11, fontweight="bold")
    place.set_title(f"exponent {exponent(found):.2f}", loc="right", fontsize=9, color=FAINT)
    place.set_ylabel(f"milliseconds {what}", color=FAINT)
    place.set_ylim(low, high)
    place.set_xlim(sizes[0] / 1.6, sizes[-1] * 1.6)
    place.set_xticks(sizes, [f"{size:,}" for size in sizes])
    place.xaxis.set_minor_locator(NullLocator())
    place.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    place.yaxis.set_minor_locator(NullLocator())
    place.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    place.tick_params(colors=FAINT, which="both", length=3)
    place.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", default=",".join(AXES), help="separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15, help="decode steps of one point in one round")
    parser.add_argument("--requests", type=int, default=300, help="of one point in one round")
    parser.add_argument("--plot", type=Path, help="an SVG file to write")
    parser.add_argument("--models", type=Path, default=Path("/tmp/loraplex-bench"), help="where the weights are kept")
    parser.add_argument("--keep", type=Path, help="a JSON file of figures to add to; the plot shows all of them")
    options = parser.parse_args()
    known = json.loads(options.keep.read_text()) if options.keep and options.keep.is_file() else {}
    results = {axis: {int(size): figure for size, figure in found.items()} for axis, found in known.items()}
    for axis in filter(None, options.axes.split(",")):
        results[axis] = found = measure(axis, options)
        points = "  ".join(f"{size}: {figure:.2f}" for size, figure in found.items())
        print(f"{axis:20} exponent {exponent(found):5.2f}   ms  {points}", flush=True)
    if options.keep:
        options.keep.write_text(json.dumps(results))
    if options.plot:
        plot({axis: results[axis] for axis in AXES if axis in results}, options.plot)


if __name__ == "__main__":
    main()
