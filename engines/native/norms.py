"""Which of the base's RMS normalisations our own kernel computes: those from which nothing tells it apart.

transformers has some hundred such modules, which differ in where they round and in what stands for a weight of one.
Each is tried on rows of several sizes; the form that comes nearest replaces it where rounding alone is between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex.kernels.fused.cpu_rms_norm import RmsNorm, is_available

# Half a unit in the last place for each of two roundings; float32 adds in another order.
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
_SCALES = (1e-3, 1.0, 30.0)  # of the rows that are tried: about the root of epsilon, and beyond
_EPSILONS = ("variance_epsilon", "eps", "epsilon")

Norm = Callable[[Tensor], Tensor]


def use_norm_kernel(model: PreTrainedModel) -> int:
    """Let the kernel compute the normalisations that it can; how many they are.

    To be called before anything else wraps them. Leaves everything as it is where the kernel is not available.
    """
    if not is_available(model.dtype, model.device):
        return 0
    replaced = [_replace_forward(module, model.dtype) for module in model.modules() if _may_be_norm(module)]
    return sum(replaced)


def _may_be_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return (
        isinstance(weight, Tensor)
        and weight.dim() == 1
        and [*module._parameters] == ["weight"]
        and not module._modules
        and not module._buffers
        and "forward" not in vars(module)
        and _epsilon(module) is not None
    )


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _epsilon(module: nn.Module) -> float | None:
    found = [value for name in _EPSILONS if isinstance(value := getattr(module, name, None), float)]
    return found[0] if len(found) == 1 else None


def _replace_forward(module: nn.Module, dtype: torch.dtype) -> bool:
    theirs: Norm = module.forward
    norm = _equal(module, dtype)
    if norm is None:
        return False

    def forward(x: Tensor) -> Tensor:
        return norm(x) if x.dtype == norm.dtype and x.shape[-1] == norm.width else theirs(x)

    module.forward = forward
    return True


@torch.inference_mode()
def _equal(module: nn.Module, dtype: torch.dtype) -> RmsNorm | None:
    """The kernel in the form that computes what the module does; None where none does."""
    generator = torch.Generator().manual_seed(0)
    width = _weight(module).shape[0]
    scales = torch.tensor(_SCALES)[:, None]
    x = (torch.randn(len(_SCALES), width, generator=generator) * scales).to(dtype)
    try:
        expected = module(x)
    except (TypeError, ValueError, RuntimeError, IndexError):  # it wants more than rows, or rows of another shape
        return None
    if not isinstance(expected, Tensor) or expected.dtype != dtype or expected.shape != x.shape:
        return None
    nearest = min(_forms(module, dtype), key=lambda norm: _distance(norm(x), expected))
    return nearest if _distance(nearest(x), expected) <= _TOLERANCES[dtype] else None


def _forms(module: nn.Module, dtype: torch.dtype) -> Iterator[RmsNorm]:
    weight, epsilon = _weight(module).detach().float(), _epsilon(module)
    assert epsilon is not None
    for whole in (weight, 1 + weight):
        for rounds_twice in (True, False):
            yield RmsNorm(whole.contiguous(), epsilon, dtype, rounds_twice=rounds_twice)


def _distance(y: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to each row's largest number."""
    largest = expected.float().abs().amax(-1, keepdim=True)
    return float(((y.float() - expected.float()).abs() / largest).nan_to_num(torch.inf).max())
