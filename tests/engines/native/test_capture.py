"""Passes that are captured and replayed: the same numbers over other inputs, in little memory, or a refusal by name."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loraplex.engines.native.capture import Capture, Graph, NotCapturable, Pool
from loraplex.kernels.built import Kernel
from loraplex.kernels.calls import Calls, is_available
from loraplex.kernels.dense.linear import Linear

pytestmark = pytest.mark.skipif(not is_available(), reason="the kernels were not built: no compiler")

WIDTH = 48


@pytest.fixture(autouse=True)
def inference() -> object:
    with torch.inference_mode():
        yield


def captured(compute: Callable[[Tensor], Tensor], x: Tensor, pool: Pool | None = None) -> Graph:
    capture = Capture()
    with capture.capturing():
        result = compute(x)
    return capture.graph(result, pool or Pool())


def layers(x: Tensor) -> Tensor:
    """Kernels, views, copies, operations in place and several outputs, between each other."""
    for _ in range(4):
        linear = Linear(WEIGHTS[0], WEIGHTS[1][0])
        y = linear(x)
        y.add_(1)
        left, right = y.view(-1, 2, WIDTH // 2).transpose(0, 1).reshape(2, -1, WIDTH // 2).unbind(0)
        largest, _ = torch.topk(torch.nn.functional.silu(left) * right, 4)
        x = x + torch.cat((left, right), -1) * largest.mean(-1, keepdim=True) @ WEIGHTS[1]
    return x


WEIGHTS = torch.randn(2, WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)) / WIDTH**0.5


def test_replay_computes_what_python_does_from_whatever_lies_there() -> None:
    x = torch.randn(5, WIDTH)
    graph = captured(layers, x)
    for seed in range(3):
        x.copy_(torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(seed)))
        expected = layers(x.clone())
        assert torch.equal(graph.replay(), expected)


def test_every_number_that_is_read_was_written_before() -> None:
    x, pool = torch.randn(5, WIDTH), Pool()
    graph = captured(layers, x, pool)
    expected = graph.replay().clone()
    pool.take(0).view(torch.float32).fill_(torch.nan)
    assert torch.equal(graph.replay(), expected)


def test_memory_of_a_graph_outlives_a_pool_that_grew() -> None:
    """Its kernels know it by its address alone, and its result may lie elsewhere."""
    x, pool, result = torch.randn(5, WIDTH), Pool(), torch.empty(5, WIDTH)
    first, second = (Linear(weight) for weight in WEIGHTS)
    graph = captured(lambda x: result.copy_(second(first(x))), x, pool)
    memory = weakref.ref(pool.take(0))
    assert len(pool.take(2**20)) == 2**20
    x.copy_(torch.randn(5, WIDTH))
    assert torch.equal(graph.replay(), second(first(x)))
    assert memory() is not None


def test_memory_is_used_again() -> None:
    """Of sixteen layers no more is needed than of four."""
    sizes = []
    for repeats in (1, 4):
        pool = Pool()

        def compute(x: Tensor, repeats: int = repeats) -> Tensor:
            for _ in range(repeats):
                x = layers(x)
            return x

        captured(compute, torch.randn(5, WIDTH), pool)
        sizes.append(len(pool.take(0)))
    assert 0 < sizes[1] < 1.2 * sizes[0]


def test_graphs_share_a_pool_one_after_the_other() -> None:
    pool = Pool()
    inputs = [torch.randn(rows, WIDTH) for rows in (3, 9, 5)]
    graphs = [captured(layers, x, pool) for x in inputs]
    for graph, x in zip(graphs, inputs, strict=True):
        assert torch.equal(graph.replay(), layers(x))


def test_what_is_outside_is_written_again() -> None:
    """As keys and values are to the cache."""
    x, cache, slots = torch.randn(2, WIDTH), torch.zeros(8, WIDTH), torch.tensor([1, 5])

    def compute(x: Tensor) -> Tensor:
        cache.index_copy_(0, slots, x * 2)
        return cache[slots] + 1

    graph = captured(compute, x)
    cache.zero_()
    slots.copy_(torch.tensor([0, 7]))
    x.fill_(3.0)
    assert torch.equal(graph.replay(), torch.full((2, WIDTH), 7.0))
    assert cache.sum(-1).tolist() == [6.0 * WIDTH, 0, 0, 0, 0, 0, 0, 6.0 * WIDTH]


@pytest.mark.parametrize(
    ("compute", "name"),
    [
        (lambda x: x * x.sum().item(), "_local_scalar_dense"),
        (lambda x: x if x.max() > 0 else -x, "_local_scalar_dense"),
        (lambda x: x * float(x.sum()), "_local_scalar_dense"),
        (lambda x: x * x[0].tolist()[0], "tolist"),
        (lambda x: x * x.numpy()[0, 0], "numpy"),
        (lambda x: torch.where(x > 0)[0], "nonzero"),
        (lambda x: x[x > 0], "index"),
        (lambda x: x[x.nonzero()[:, 0]], "nonzero"),
        (lambda x: x + torch.rand_like(x), "rand"),
        (lambda x: x.unique(), "unique"),
        (lambda x: torch.empty(0).resize_(x.shape).copy_(x), "resize"),
    ],
)
def test_what_depends_on_values_or_chance_is_refused_by_name(compute: Callable[[Tensor], Tensor], name: str) -> None:
    with pytest.raises(NotCapturable, match=name):
        captured(compute, torch.ones(3, WIDTH))


def test_dropout_that_is_off_is_not_chance() -> None:
    x = torch.randn(3, WIDTH)
    graph = captured(lambda x: torch.nn.functional.dropout(x + 1, 0.5, training=False), x)
    x.fill_(1.0)
    assert torch.equal(graph.replay(), torch.full((3, WIDTH), 2.0))


def test_attention_without_dropout_is_not_chance() -> None:
    attend = torch.nn.functional.scaled_dot_product_attention
    x = torch.randn(1, 2, 5, WIDTH)
    graph = captured(lambda x: attend(x, x, x, is_causal=True), x)
    x.copy_(torch.randn(1, 2, 5, WIDTH))
    assert torch.equal(graph.replay(), attend(x, x, x, is_causal=True))
    with pytest.raises(NotCapturable, match="chance"):
        captured(lambda x: attend(x, x, x, dropout_p=0.5), x)


def test_calls_of_more_arguments_than_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 8"):
        Calls([(Kernel(print), range(9))])


def test_tensors_read_as_before_when_a_capture_is_over() -> None:
    before = {name: getattr(Tensor, name) for name in ("tolist", "numpy", "__array__")}
    captured(lambda x: x + 1, torch.ones(3))
    assert {name: getattr(Tensor, name) for name in before} == before
    assert "tolist" not in vars(Tensor)


def test_kernels_are_heard_only_within() -> None:
    linear, x = Linear(WEIGHTS[0]), torch.randn(2, WIDTH)
    graph = captured(linear, x)
    linear(torch.zeros(2, WIDTH))
    x.fill_(1.0)
    assert torch.equal(graph.replay(), linear(torch.ones(2, WIDTH)))
