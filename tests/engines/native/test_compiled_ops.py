"""Decoder layers compiled whole inside the runner, against the same runner before: same numbers, few compilations."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.core import make_core, request, run
from support.models import SPECS, Oracle, llama_config, make_adapter, make_model
from support.worlds import SmallWorld, make_small_world
from torch import Tensor, fx
from torch._dynamo.backends.registry import lookup_backend
from transformers import Gemma2Config, PretrainedConfig, Qwen3Config

from loraplex.engines.native import compiled_ops, dense
from loraplex.engines.native.core import EngineCore
from loraplex.engines.native.device_lora import DeviceLora
from loraplex.kernels.attention.cpu_rotary import is_available

pytestmark = pytest.mark.timeout(400)  # a compiler may be at work, and Triton's interpreter

# (adapters of the requests, how many tokens each is asked for): they come and go, so batches have all sizes.
FIRST = (["rank-4", None, "rank-8", "rank-64-mlp"], [3, 5, 7, 9])
OTHERS = ([None, None, "rank-32-dora", "rank-16-rslora", "rank-8", "rank-4"], [2, 3, 4, 6, 8, 12])
SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 112, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 512, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip
# Gemma2 has a window in every other layer, caps, and norms of another form; Qwen3 norms of heads.
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": llama_config(),
    "gemma2": Gemma2Config(
        **SIZES, num_hidden_layers=4, sliding_window=8, query_pre_attn_scalar=16, attn_logit_softcapping=20.0
    ),
    "qwen3": Qwen3Config(**SIZES, num_hidden_layers=3),
}


class Graphs:
    """A backend that counts what it compiles, and knows the operations in it."""

    def __init__(self, backend: str) -> None:
        self.num = 0
        self.operations: set[str] = set()
        self._compile = lookup_backend(backend)

    def __call__(self, graph: fx.GraphModule, example: list[Tensor]) -> Any:
        self.num += 1
        self.operations |= {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
        return self._compile(graph, example)


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    directory = tmp_path_factory.mktemp(request.param)
    make_model(CONFIGS[request.param], directory / "base")
    adapters = {spec.name: make_adapter(directory / "base", spec, directory / "adapters") for spec in SPECS}
    return SmallWorld(directory / "base", adapters, Oracle(directory / "base"))


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was compiled before; and our own linear layer computes steps of few tokens, as it is on some machines."""
    torch.compiler.reset()
    monkeypatch.setattr(dense, "_numbers_of_tokens", lambda weights: range(1, 5))


def layers_of(core: EngineCore) -> Any:
    model: Any = core._machine.runner._model
    return model.model.layers


def compile_layers(core: EngineCore, backend: str) -> Graphs:
    graphs = Graphs(backend)
    for layer in layers_of(core):
        layer.compile(fullgraph=True, dynamic=True, backend=graphs)
    return graphs


def steps(core: EngineCore, world: SmallWorld, names: list[str | None], lengths: list[int]) -> list[Tensor]:
    """The logits of every step of some traffic: prompts, then ever fewer sequences. Shapes [N, V]."""
    runner, found = core._machine.runner, []
    logits = runner.logits

    def noting(batch: Any) -> Tensor:
        found.append(logits(batch).clone())
        return found[-1]

    runner.logits = noting  # type: ignore[method-assign]
    try:
        for number, (name, length) in enumerate(zip(names, lengths, strict=True)):
            adapter = None if name is None else world.adapters[name]
            prompt = [(7 * number + 3 * place) % 250 for place in range(6 + number)]
            core.submit(request(f"{len(found)}-{number}", prompt, adapter, max_tokens=length, ignore_eos=True))
        run(core, seconds=300.0)
    finally:
        del runner.logits
    return found


def settled(core: EngineCore, world: SmallWorld, traffic: tuple[list[str | None], list[int]]) -> list[Tensor]:
    """As all later times: adapters are there, and prompts are in the cache but for their ends."""
    for _ in range(2):
        found = steps(core, world, *traffic)
    return found


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """As many steps, and the same bits in each."""
    assert [torch.equal(*pair) for pair in zip(found, expected, strict=True)] == [True] * len(expected)


def test_compiled_layers_give_the_bits_of_the_model_whatever_the_step(world: SmallWorld) -> None:
    core = make_core(world, enforce_eager=True, max_draft_tokens=0)
    expected, others = settled(core, world, FIRST), settled(core, world, OTHERS)
    assert len({len(step) for step in (*expected, *others)}) >= 5
    graphs = compile_layers(core, "aot_eager")
    found = steps(core, world, *FIRST)
    assert_same(found, expected)
    num_compiled = graphs.num
    assert num_compiled <= 5  # one token or several, with a window or without; and torch begins again for a scale
    assert_same(steps(core, world, *OTHERS), others)
    assert graphs.num == num_compiled
    ours = {"loraplex.add_to_rows.default", "loraplex.attend.default"}
    if is_available(torch.float32, torch.device("cpu")):  # the kernels were built
        ours |= {"loraplex.map_rows.default", "loraplex.rotate.default"}
    assert ours <= graphs.operations


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # when it is imported
def test_layers_compiled_to_machine_code_give_the_numbers_of_the_model(world: SmallWorld) -> None:
    """Sums are made in another order, of float32; logits are some ten wide."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    core = make_core(world, enforce_eager=True, max_draft_tokens=0)
    expected = settled(core, world, FIRST)
    graphs = compile_layers(core, "inductor")
    found = steps(core, world, *FIRST)
    assert graphs.num <= 5
    for step, known in zip(found, expected, strict=True):
        torch.testing.assert_close(step, known, rtol=1e-4, atol=1e-3)


def test_compiled_layers_on_the_kernels_give_the_bits_of_the_model(tmp_path: Path) -> None:
    small = make_small_world(tmp_path, num_hidden_layers=1)
    core = make_core(small, kernels="triton", max_batch_tokens=24, max_draft_tokens=0)
    assert isinstance(core._machine.runner._lora, DeviceLora)
    traffic: tuple[list[str | None], list[int]] = (["rank-4", None, "rank-8"], [1, 2, 3])
    others: tuple[list[str | None], list[int]] = (["rank-64-mlp", "rank-32-dora"], [1, 2])
    expected, expected_others = settled(core, small, traffic), settled(core, small, others)
    graphs = compile_layers(core, "aot_eager")
    assert_same(steps(core, small, *traffic), expected)
    num_compiled = graphs.num
    assert num_compiled <= 3
    assert_same(steps(core, small, *others), expected_others)
    assert graphs.num == num_compiled
    assert {"loraplex.add_to_rows.default", "loraplex.attend.default"} <= graphs.operations


def test_shrunk_rows_are_not_taken_for_those_of_the_same_memory(tmp_path: Path) -> None:
    """A compiled layer may make new numbers where the old ones were."""
    small = make_small_world(tmp_path, num_hidden_layers=1)
    core = make_core(small, kernels="triton", max_batch_tokens=24, max_draft_tokens=0)
    steps(core, small, ["rank-8"], [1])
    lora, q_proj = core._machine.runner._lora, layers_of(core)[0].self_attn.q_proj
    x = torch.randn(1, 1, 64)
    with torch.inference_mode():
        lora.begin([((small.adapters["rank-8"].id, 1.0),)], [0], x.device)
        before = q_proj(x)
        x.mul_(2.0)
        torch.testing.assert_close(q_proj(x), 2.0 * before, rtol=1e-5, atol=1e-5)


def test_attention_keeps_its_calls_in_order_though_nothing_else_tells_it() -> None:
    """Two calls that do not depend on one another, the first of which gives what nobody reads."""
    calls: list[float] = []

    def noting(module: Any, query: Tensor, *others: Any) -> tuple[Tensor, None]:
        calls.append(float(query.flatten()[0]))
        return query.transpose(1, 2).clone(), None

    handle = compiled_ops.handle_of(noting)

    def both(q: Tensor) -> Tensor:
        compiled_ops.attend(q, q, q, handle, 1.0, None, None, None)
        second: Tensor = compiled_ops.attend(q + 1, q, q, handle, 1.0, None, None, None)
        return second

    q = torch.zeros(1, 2, 3, 4)
    out = torch.compile(both, fullgraph=True, backend="aot_eager")(q)
    assert torch.equal(out, torch.ones(1, 3, 2, 4))
    assert calls == [0.0, 1.0]


@pytest.mark.parametrize("operation", ["map_rows", "combine_rows", "add_to_rows", "rotate", "attend"])
def test_operations_are_what_they_say_of_themselves(operation: str) -> None:
    """torch's own check: what is changed, what shapes and strides come out, with shapes known and unknown."""
    functions: dict[str, Any] = {
        "map_rows": lambda x: torch.cat((x, x), -1),
        "combine_rows": lambda one, other: one * other,
        "add_to_rows": lambda y, x: y.add_(x.sum()),
        "attend": lambda module, query, *others: (query.transpose(1, 2).clone(), None),
        "rotate": None,
    }
    function = functions[operation]
    handle = compiled_ops.handle_of(function) if function else torch.tensor(0)
    rows, heads, angles = torch.randn(1, 3, 4), torch.randn(1, 3, 2, 4).transpose(1, 2), torch.randn(1, 3, 4)
    arguments: dict[str, tuple[Any, ...]] = {
        "map_rows": (rows, 8, handle),
        "combine_rows": (rows, rows.clone(), handle),
        "add_to_rows": (rows, rows.clone(), handle),
        "attend": (heads, heads, heads, handle, 0.5, 3, None, None),
        "rotate": (heads, heads.clone(), angles, angles),
    }
    if operation == "rotate" and not is_available(torch.float32, rows.device):
        pytest.skip("the kernel was not built: no compiler")
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    shown = torch.library.opcheck(getattr(compiled_ops, operation), arguments[operation], test_utils=checks)
    assert set(shown.values()) == {"SUCCESS"}


def test_handles_keep_nothing_alive() -> None:
    def function(x: Tensor) -> Tensor:
        return x + 1

    handle, x = compiled_ops.handle_of(function), torch.ones(2)
    assert torch.equal(compiled_ops.map_rows(x, 2, handle), x + 1)
    del function
    with pytest.raises(KeyError):
        compiled_ops.map_rows(x, 2, handle)
