"""Replayed steps on the Triton kernels, interpreted: what a CUDA graph would read again must lie where it lay.

No GPU is needed: a recording here runs the same Python once more, over what the step's objects were when it was
recorded. What had been made anew since, and not written into their place, would be missed as a graph misses it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.core import make_core, prompt_of, request, run, tokens
from support.models import AdapterSpec, make_adapter
from support.worlds import SmallWorld, make_small_world
from torch import Tensor, nn

from loraplex.engines.native import device_attention, step_graphs
from loraplex.engines.native.capture import NotCapturable
from loraplex.engines.native.core import EngineCore
from loraplex.engines.native.cuda_replays import CudaRecorder, CudaReplays
from loraplex.engines.native.device_lora import DeviceLora
from loraplex.engines.native.step_graphs import StepGraphs

pytestmark = pytest.mark.timeout(400)  # the interpreter takes milliseconds for what a GPU does in none

SAME = ["rank-4", "rank-6", "rank-12"]  # the layers that they touch


class Rerun:
    """A recording that runs its forward pass once more, with LoRA's step as it was then."""

    def __init__(self, lora: DeviceLora, forward: Callable[[], Tensor]) -> None:
        self._lora, self._forward, self._step = lora, forward, lora._step
        self._logits = torch.full_like(forward(), float("nan"))
        self.num_replays = 0

    def replay(self) -> Tensor:
        self.num_replays += 1
        now, self._lora._step, self._lora._shrunk = self._lora._step, self._step, None
        self._logits.copy_(self._forward())
        self._lora._step = now
        return self._logits


class Recorder:
    def __init__(self, core: EngineCore) -> None:
        runner = core._machine.runner
        assert isinstance(runner._lora, DeviceLora)
        self._lora = runner._lora
        self.recordings: list[Rerun] = []
        num_blocks = runner._num_slots // runner._block_size
        replays = CudaReplays(num_blocks, runner._block_size, torch.device("cpu"), self)
        runner.graphs = StepGraphs(runner._through_model, runner._attention, runner._lora, replays)

    def __call__(self, forward: Callable[[], Tensor]) -> Rerun:
        self.recordings.append(Rerun(self._lora, forward))
        return self.recordings[-1]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a kind are captured when the second one comes, and attention takes few of the interpreter's programs."""
    for bound in ("FEWEST_STEPS", "MOST_STEPS"):
        monkeypatch.setattr(step_graphs, bound, 1)
    monkeypatch.setattr(device_attention, "_PROGRAMS", 12)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    """One layer: the others would do the same again, at the interpreter's pace. Three adapters touch the same."""
    directory = tmp_path_factory.mktemp("shallow")
    world = make_small_world(directory, num_hidden_layers=1)
    for name, rank in (("rank-6", 6), ("rank-12", 12)):
        world.adapters[name] = make_adapter(directory / "base", AdapterSpec(name, rank), directory / "adapters")
    return world


@pytest.fixture
def core(shallow: SmallWorld) -> EngineCore:
    return make_core(shallow, kernels="triton", max_draft_tokens=0, max_batch_tokens=64)


def answers(core: EngineCore, shallow: SmallWorld, names: list[str | None], lengths: list[int], first: int) -> None:
    """Ask for answers of so many tokens and hold them against transformers and PEFT."""
    prompts = [prompt_of(first + number, 4 + 2 * number) for number in range(len(names))]
    for number, (name, length) in enumerate(zip(names, lengths, strict=True)):
        adapter = None if name is None else shallow.adapters[name]
        core.submit(request(str(number), prompts[number], adapter, max_tokens=length, ignore_eos=True))
    found = run(core, seconds=300.0)
    for number, (name, length) in enumerate(zip(names, lengths, strict=True)):
        adapter = None if name is None else shallow.adapters[name]
        expected = shallow.oracle.greedy(prompts[number], length, adapter)
        assert tokens(found[str(number)])[: len(expected)] == expected, name


def test_replayed_steps_give_the_tokens_of_peft_for_any_adapters(shallow: SmallWorld, core: EngineCore) -> None:
    """One adapter after another through the graph that the first had captured, evicted in between; three are padded."""
    recorder = Recorder(core)
    answers(core, shallow, [SAME[0]] * 3, [7, 7, 7], first=0)
    [recording] = recorder.recordings
    for first, name in enumerate([*SAME[1:], SAME[0]]):
        num_before = recording.num_replays
        answers(core, shallow, [name] * 3, [7, 7, 7], first=10 * first)
        assert recording.num_replays >= num_before + 5
        core.adapters.unload(shallow.adapters[name].id)
    assert recorder.recordings == [recording]
    assert core._machine.runner.graphs is not None
    assert core._machine.runner.graphs.is_on


def test_sequences_come_and_go_between_replays(shallow: SmallWorld, core: EngineCore) -> None:
    """Every number of rows from three to one, with other block tables and lengths each time; base and adapters."""
    recorder = Recorder(core)
    for first in range(2):
        answers(core, shallow, [None, "rank-8", "rank-64-mlp"], [4, 8, 12], first=10 * first)
    assert sum(recording.num_replays for recording in recorder.recordings) >= 12


def test_base_alone_has_graphs_without_lora(shallow: SmallWorld, core: EngineCore) -> None:
    recorder = Recorder(core)
    answers(core, shallow, [None], [8], first=1)
    graphs = core._machine.runner.graphs
    assert graphs is not None
    assert {kind.adapters for kind in graphs._graphs} == {None}
    assert recorder.recordings[0].num_replays == 5  # a prompt, one as it is, one recorded, one of them checked


def test_adapters_that_do_more_than_lora_go_through_the_model(shallow: SmallWorld, core: EngineCore) -> None:
    recorder = Recorder(core)
    answers(core, shallow, ["rank-32-dora"], [6], first=2)
    assert recorder.recordings == []


def test_what_cannot_be_captured_goes_through_the_model(
    shallow: SmallWorld, core: EngineCore, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(core)

    def refuse(forward: Callable[[], Tensor]) -> Rerun:
        raise NotCapturable("operation not permitted when stream is capturing")

    graphs = core._machine.runner.graphs
    assert graphs is not None
    graphs._replays._record = refuse  # type: ignore[attr-defined]
    with caplog.at_level("INFO", "loraplex.engine"):
        answers(core, shallow, ["rank-8"], [6], first=3)
    assert not graphs.is_on
    assert recorder.recordings == []
    assert "operation not permitted when stream is capturing" in caplog.text


class Captured:
    def capture_begin(self, *args: object, **named: object) -> None:
        pass

    def capture_end(self) -> None:
        pass


class Invalidated(Captured):
    """As after an operation that CUDA does not permit in a capture."""

    def capture_end(self) -> None:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize("graph", [Captured, Invalidated])
def test_refused_capture_says_why_and_leaves_the_thread_on_its_stream(
    graph: type[Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's own context of a capture, over streams that are none."""
    current = ["the thread's"]

    class On:
        def __init__(self, stream: str) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.stream

        def __exit__(self, *args: object) -> None:
            current[0] = self.before

    def refuse() -> Tensor:
        raise RuntimeError("operation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "stream", On)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: current.__setitem__(0, stream))
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", "the capture's")
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    for name in ("synchronize", "empty_cache", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda: (0, 1))
    with pytest.raises(NotCapturable, match=r"^operation not permitted when stream is capturing$"):
        CudaRecorder()(refuse)
    assert current == ["the thread's"]


def test_replay_that_differs_is_never_used(
    shallow: SmallWorld, core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    Recorder(core)

    def wrong(self: Rerun) -> Tensor:
        return self._logits.zero_()

    monkeypatch.setattr(Rerun, "replay", wrong)
    answers(core, shallow, ["rank-8"], [6], first=4)
    graphs = core._machine.runner.graphs
    assert graphs is not None
    assert not graphs.is_on


def test_model_does_not_run_beside_a_replay(shallow: SmallWorld, core: EngineCore) -> None:
    """The recording here runs it once a replay: a prompt and three replays are four passes, if nothing else is run."""
    recorder = Recorder(core)
    calls: list[int] = []
    model: nn.Module = core._machine.runner._model
    model.register_forward_pre_hook(lambda module, args: calls.append(1))
    answers(core, shallow, [None], [4], first=5)
    [recording] = recorder.recordings
    num_calls, num_replays = len(calls), recording.num_replays
    answers(core, shallow, [None], [4], first=5)
    assert recording.num_replays == num_replays + 3
    assert len(calls) == num_calls + 4


@pytest.mark.parametrize(("num_tokens", "expected"), [(1, 1), (3, 4), (9, 16), (33, 48), (256, 256)])
def test_steps_are_padded_to_few_sizes(num_tokens: int, expected: int) -> None:
    replays: Any = CudaReplays(4, 16, torch.device("cpu"), lambda forward: None)  # type: ignore[arg-type, return-value]
    assert replays.padded(num_tokens, is_even=True) == expected
