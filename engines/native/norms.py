"""Which of the base's RMS normalisations our own kernels compute: those from which nothing tells them apart.

transformers has some hundred such modules, which differ in where they round and in what stands for a weight of one.
Each is tried on rows of several sizes; the form that comes nearest replaces it where rounding alone is between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from transformers import PreTrainedModel

from loraplex.engines.native.compiled_ops import handle_of, map_rows
from loraplex.kernels.fused import cpu_rms_norm
from loraplex.kernels.fused.cpu_rms_norm import RmsNorm
from loraplex.kernels.fused.rms_norm import rms_norm

# One unit in the last place: half of one for each of two roundings. float32 adds in another order.
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
_SCALES = (1e-3, 1.0, 30.0)  # of the rows that are tried: about the root of epsilon, and beyond
_EPSILONS = ("variance_epsilon", "eps", "epsilon")

Norm = Callable[[Tensor], Tensor]


def use_norm_kernel(model: PreTrainedModel, *, uses_kernels: bool) -> int:
    """Let a kernel compute the normalisations that it can; how many they are. `uses_kernels`: Triton's, or those in C.

    To be called before anything else wraps them. Leaves everything as it is where no kernel is available.
    """
    known = uses_kernels or cpu_rms_norm.is_available(model.dtype, model.device)
    if not known or model.dtype not in _TOLERANCES:
        return 0
    forms = _triton_forms if uses_kernels else _cpu_forms
    return sum(_replace_forward(module, model.dtype, forms) for module in model.modules() if _may_be_norm(module))


def _may_be_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return (
        isinstance(weight, Tensor)
        and weight.dim() == 1
        and [*module._parameters] == ["weight"]
        and not module._modules
        and not module._buffers
        and "forward" not in vars(module)
        and len(_epsilons(module)) == 1
    )


def _epsilons(module: nn.Module) -> list[float]:
    return [value for name in _EPSILONS if isinstance(value := getattr(module, name, None), float)]


def _replace_forward(
    module: nn.Module, dtype: torch.dtype, forms: Callable[[Tensor, float, torch.dtype], Iterator[Norm]]
) -> bool:
    theirs, weight = module.forward, module.weight
    assert isinstance(weight, Tensor)
    [epsilon] = _epsilons(module)
    width = weight.shape[0]
    ours = _equal(module, width, [*forms(weight.detach().float(), epsilon, dtype)], weight.device, dtype)
    if ours is None:
        return False

    def forward(x: Tensor) -> Tensor:
        if x.dtype == dtype and x.shape[-1] == width:
            return map_rows(x, width, handle) if is_dynamo_compiling() else ours(x)
        computed: Tensor = theirs(x)
        return computed

    handle = handle_of(ours)
    module.forward = forward
    return True


@torch.inference_mode()
def _equal(module: nn.Module, width: int, forms: list[Norm], device: torch.device, dtype: torch.dtype) -> Norm | None:
    """The one of the forms that computes what the module does; None where none does."""
    rows = torch.randn(len(_SCALES), width, generator=torch.Generator().manual_seed(0))
    x = (rows * torch.tensor(_SCALES)[:, None]).to(device, dtype)
    try:
        expected = module(x)
    except Exception:  # noqa: BLE001  a model's own code, which may want more than rows, or rows of another shape
        return None
    if not isinstance(expected, Tensor) or expected.dtype != dtype or expected.shape != x.shape:
        return None
    nearest = min(forms, key=lambda form: _distance(form(x), expected))
    return nearest if _distance(nearest(x), expected) <= _TOLERANCES[dtype] else None


def _distance(y: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to each row's largest number."""
    largest = expected.float().abs().amax(-1, keepdim=True)
    return float(((y.float() - expected.float()).abs() / largest).nan_to_num(torch.inf).max())


def _cpu_forms(weight: Tensor, epsilon: float, dtype: torch.dtype) -> Iterator[Norm]:
    for whole in (weight, 1 + weight):
        for rounds_twice in (True, False):
            yield RmsNorm(whole.contiguous(), epsilon, dtype, rounds_twice=rounds_twice)


def _triton_forms(weight: Tensor, epsilon: float, dtype: torch.dtype) -> Iterator[Norm]:
    for whole in (weight, 1 + weight):
        yield partial(_by_triton, whole, epsilon)


def _by_triton(weight: Tensor, epsilon: float, x: Tensor) -> Tensor:
    return rms_norm(x.contiguous(), weight, epsilon)
