"""Which of the base's MLPs have their gate computed by our own kernel: down(activation(gate(x)) · up(x)) and no other.

Each such module is tried with stand-ins for its linear layers, which tell what they are given: whatever it computes
between them shows, and nothing large is multiplied. Its layers stay modules that are called, as LoRA and the dense
kernel, which wrap them later, need it; only what is between them is replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn import functional
from transformers import PreTrainedModel

from loraplex.engines.native.compiled_ops import combine_rows, handle_of
from loraplex.kernels.fused import cpu_gated
from loraplex.kernels.fused.cpu_gated import Gate
from loraplex.kernels.fused.gated import Activation, gated

# One unit in the last place, of each row's largest number. float32, in which exponentials differ, tells which function
# it is: the closest others, two forms of GELU, are 1e-4 apart.
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
_SCALES = (1e-3, 1.0, 30.0)  # of the rows that are tried: what is held within bounds shows by the last
_WIDTH = 64
_SEPARATE, _FUSED, _DOWN = ("gate_proj", "up_proj"), ("gate_up_proj",), "down_proj"

Gating = Callable[[Tensor, Tensor], Tensor]


def use_gate_kernel(model: PreTrainedModel, *, uses_kernels: bool) -> int:
    """Let a kernel compute the gates that it can; how many they are. `uses_kernels`: Triton's, or those in C.

    Leaves everything as it is where no kernel is available.
    """
    known = uses_kernels or cpu_gated.is_available(model.dtype, model.device)
    if not known or model.dtype not in _TOLERANCES:
        return 0
    of: Callable[[Activation], Gating] = _by_triton if uses_kernels else partial(Gate, dtype=model.dtype)
    gatings = {activation: of(activation) for activation in get_args(Activation)}
    return sum(_replace_forward(module, model, gatings) for module in model.modules() if _may_be_gated(module))


def _by_triton(activation: Activation) -> Gating:
    return partial(gated, activation=activation)


def _inner(module: nn.Module) -> tuple[str, ...]:
    """The names of the layers before the gate."""
    return _FUSED if _FUSED[0] in module._modules else _SEPARATE


def _may_be_gated(module: nn.Module) -> bool:
    """Whether it has the layers, and nothing beside them that is learned, listened to, or random."""
    layers = {*_inner(module), _DOWN}
    others = [child for name, child in module._modules.items() if name not in layers and child is not None]
    return (
        all(isinstance(module._modules.get(name), nn.Module) for name in layers)
        and not (module._parameters or module._buffers or module.training)
        and "forward" not in vars(module)
        and not any(next(child.parameters(), None) is not None or _is_heard(child) for child in others)
    )


def _is_heard(module: nn.Module) -> bool:
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def _replace_forward(module: nn.Module, model: PreTrainedModel, gatings: dict[Activation, Gating]) -> bool:
    activation = _activation(module, model.device)
    if activation is None or not _is_equal(module, gatings[activation], model.dtype, model.device):
        return False
    theirs, dtype, inner = module.forward, model.dtype, _inner(module)
    ours, by_torch = gatings[activation], _BY_TORCH[activation]
    layers: dict[str, Any] = module._modules  # as they are when it is called

    def forward(*args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs:
            return theirs(*args, **kwargs)
        [x] = args
        given = [layers[name](x) for name in inner]
        gate, up = given if len(given) == 2 else given[0].chunk(2, dim=-1)
        fits = gate.dtype == up.dtype == dtype and gate.shape == up.shape
        if fits and is_dynamo_compiling():
            return layers[_DOWN](combine_rows(gate, up, handle))
        return layers[_DOWN]((ours if fits else by_torch)(gate, up))

    handle = handle_of(ours)
    module.forward = forward
    return True


_BY_TORCH: dict[Activation, Gating] = {
    "silu": lambda gate, up: functional.silu(gate) * up,
    "gelu": lambda gate, up: functional.gelu(gate) * up,
    "gelu_tanh": lambda gate, up: functional.gelu(gate, approximate="tanh") * up,
}


def _activation(module: nn.Module, device: torch.device) -> Activation | None:
    """The one that makes of the module's layers what it computes; None where it computes something else."""
    found = [name for name, by_torch in _BY_TORCH.items() if _is_equal(module, by_torch, torch.float32, device)]
    return found[0] if len(found) == 1 else None


class _Layer(nn.Module):
    """Stands for a linear layer: gives what it is told to, and keeps what it was given."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output
        self.given: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.given = x
        return self.output


@torch.inference_mode()
def _is_equal(module: nn.Module, gating: Gating, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the module gives its input to the first layers, what is gated to the last, and returns that one's."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, len(_SCALES), _WIDTH, generator=generator) * torch.tensor(_SCALES)[:, None]
    x, gate, up, y = rows[:, None].to(device, dtype)
    given = [torch.cat((gate, up), -1)] if _inner(module) == _FUSED else [gate, up]
    inner, down = [_Layer(output.clone()) for output in given], _Layer(y.clone())
    tried = copy(module)
    tried._modules = {**module._modules, **dict(zip(_inner(module), inner, strict=True)), _DOWN: down}
    try:
        output = tried.forward(x.clone())
    except Exception:  # noqa: BLE001  a model's own code, which may want more of its layers than a call
        return False
    if not isinstance(output, Tensor) or output.dtype != dtype or not torch.equal(output, y):
        return False
    if not all(layer.given is not None and torch.equal(layer.given, x) for layer in inner) or down.given is None:
        return False
    expected = gating(gate, up)
    if down.given.dtype != dtype or down.given.shape != expected.shape:
        return False
    largest = expected.float().abs().amax(-1, keepdim=True)
    differences = (down.given.float() - expected.float()).abs() / largest
    return float(differences.nan_to_num(torch.inf).max()) <= _TOLERANCES[dtype]
