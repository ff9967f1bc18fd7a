"""What adapters do beside A and B of linear layers (see `adapters/extras.py`), for the tokens of the step they own.

A module is wrapped when the first adapter that touches it is computed with; until then it costs nothing. Its forward
pass runs for all tokens, then for each such adapter its own tokens' rows are computed again and put in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from loraplex.engines.adapters.arena import Arena
from loraplex.engines.adapters.extras import Extra
from loraplex.engines.adapters.peft import AdapterPlan
from loraplex.engines.native.experts import experts_with_lora, runs_experts
from loraplex.engines.native.lora import Owners
from loraplex.engines.native.model import Passage, Trial

# One module's part of an adapter: (output of the adapter's rows, its inputs there) -> what stands there instead.
Effect = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class _Owned:
    """An adapter's effect on one module, and which rows of the step it has: among all tokens, or the sampled ones."""

    effect: Effect
    rows: Tensor


class Effects:
    """The extras of the adapters of one step, by module."""

    def __init__(self, model: PreTrainedModel, trial: Trial, arena: Arena) -> None:
        self._model = model
        self._passages = trial.passages
        self._arena = arena
        self._wrapped: set[str] = set()
        self._now: dict[str, list[_Owned]] = {}

    def begin(
        self, owners: Sequence[Owners], sampled: Sequence[int], device: torch.device, *, one_by_one: bool = False
    ) -> None:
        """Set the step; the arguments are those of `LoraLayers.begin`."""
        self._now = {}
        for adapter_id in {adapter_id for parts in set(owners) for adapter_id, _ in parts}:
            plan = self._arena.plan(adapter_id)
            by_module: dict[str, list[Extra]] = {}
            for extra in plan.extra.extras:
                by_module.setdefault(extra.module, []).append(extra)
            if not by_module:
                continue
            alone = ((adapter_id, 1.0),)  # such an adapter is never part of a composition
            rows = [row for row, parts in enumerate(owners) if parts == alone]
            picked = [row for row, token in enumerate(sampled) if owners[token] == alone]
            for name, extras in by_module.items():
                chosen = picked if self._passages[name].selected else rows
                if chosen:
                    effect = self._effect(name, extras, plan, self._arena.flat(adapter_id))
                    groups = [[row] for row in chosen] if one_by_one else [chosen]
                    self._now.setdefault(name, []).extend(
                        _Owned(effect, torch.tensor(group, device=device)) for group in groups
                    )
                    self._wrap(name)

    def _wrap(self, name: str) -> None:
        if name in self._wrapped:
            return
        self._wrapped.add(name)
        module, passage = self._model.get_submodule(name), self._passages[name]
        forward: Callable[..., Any] = module.forward

        def forward_with_effects(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            for owned in self._now.get(name, ()):
                own_args = tuple(
                    _rows(value, passage.inputs.get(place), owned.rows) for place, value in enumerate(args)
                )
                own_kwargs = {key: _rows(value, passage.inputs.get(key), owned.rows) for key, value in kwargs.items()}
                output = _replace(output, passage, owned, own_args, own_kwargs)
            return output

        module.forward = forward_with_effects

    def _effect(self, name: str, extras: Sequence[Extra], plan: AdapterPlan, flat: Tensor) -> Effect:
        """All that one adapter does at one module, in the order: whole parameters, then what is added."""
        module = self._model.get_submodule(name)
        swapped = {extra.parameter: extra.spans["new"].of(flat) for extra in extras if extra.kind == "swap"}
        lora = {
            extra.parameter: (extra.spans["a"].of(flat), extra.spans["b"].of(flat), extra.scale)
            for extra in extras if extra.kind == "parameter"
        }  # fmt: skip
        steps = [
            _trained_head(extra, module, plan, flat) if extra.kind == "head" else _added(extra, module, flat)
            for extra in extras if extra.kind not in ("swap", "parameter")
        ]  # fmt: skip
        raw: Callable[..., Any] = type(module).forward  # beneath the LoRA, whose step knows all tokens

        def apply(output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if lora and not swapped and runs_experts(module):
                output = experts_with_lora(module, lora, *args, **kwargs)
            elif lora or swapped:
                full = {key: _with_lora(module, key, swapped, *factors) for key, factors in lora.items()}
                with _in_place({**swapped, **full}, module):
                    output = raw(module, *args, **kwargs)
            for step in steps:
                output = step(output, args[0] if args else next(iter(kwargs.values())))
            return output

        return apply


def _added(extra: Extra, module: nn.Module, flat: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """(output, first input) -> output of the adapter's rows."""
    parts = {name: span.of(flat) for name, span in extra.spans.items()}
    if extra.kind == "bias":
        return lambda y, x: y + parts["delta"]
    if extra.kind == "embedding":
        return lambda y, ids: y + _scaled(module, (functional.embedding(ids, parts["a"]) @ parts["b"]) * extra.scale)
    token_ids = torch.tensor(extra.token_ids, device=flat.device)

    def replace_tokens(y: Tensor, ids: Tensor) -> Tensor:
        is_own = ids[..., None] == token_ids
        rows = _scaled(module, functional.embedding(is_own.long().argmax(-1), parts["rows"]))
        return torch.where(is_own.any(-1)[..., None], rows, y)

    return replace_tokens


def _trained_head(extra: Extra, head: nn.Module, plan: AdapterPlan, flat: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """(logits, input) -> logits, those of the trained tokens with their own rows: rows·x + scale·B·A·x.

    The LoRA's part is computed again: what the logits have of it cannot be told from the base's rows.
    """
    rows, token_ids = extra.spans["rows"].of(flat), torch.tensor(extra.token_ids, device=flat.device)
    entry = next((entry for entry in plan.entries.values() if entry.module.name == extra.module), None)
    lora = None if entry is None else (entry.a_of(flat).t(), entry.b_of(flat)[:, token_ids] * entry.scale)

    def replace_logits(y: Tensor, x: Tensor) -> Tensor:
        own = x @ rows.t()
        if lora is not None:
            own = own + x @ lora[0] @ lora[1]
        return _without_bias(head, y).index_copy(y.dim() - 1, token_ids, own.to(y.dtype))

    return replace_logits


def _without_bias(head: nn.Module, y: Tensor) -> Tensor:
    """PEFT computes a head with trained rows without its bias, so they were trained without it."""
    bias = getattr(head, "bias", None)
    return y - bias if isinstance(bias, Tensor) else y


def _scaled(module: nn.Module, rows: Tensor) -> Tensor:
    """Some embeddings multiply what they look up (Gemma's)."""
    scale = getattr(module, "embed_scale", None)
    if scale is None:
        return rows
    return rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)


def _with_lora(
    module: nn.Module, key: str, swapped: Mapping[str, Tensor], a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """The parameter + scale · B·A, as PEFT's `ParamWrapper` has it. A copy: for small ones, such as routers."""
    weight = swapped[key] if key in swapped else module._parameters[key]
    assert weight is not None
    if weight.dim() == 2:
        return weight + (b @ a) * scale
    experts, rank = weight.shape[0], a.shape[0] // weight.shape[0]
    down = a.view(experts, rank, -1)
    up = b.view(b.shape[0], rank, experts).permute(2, 0, 1)
    delta = torch.bmm(up, down) * scale
    return weight + (delta.transpose(1, 2) if getattr(module, "is_transposed", False) else delta)


@contextmanager
def _in_place(parameters: Mapping[str, Tensor], module: nn.Module) -> Iterator[None]:
    """The module with other parameters, until the block ends.

    Not assigned one by one: a library's own table (compressed-tensors' of weights that can be offloaded) copies what it
    is assigned into the tensor that was there, the base's.
    """
    own_parameters: Any = module._parameters
    own_buffers = module._buffers
    module._parameters = {key: parameters.get(key, tensor) for key, tensor in own_parameters.items()}
    module._buffers = {key: parameters.get(key, tensor) for key, tensor in own_buffers.items()}
    try:
        yield
    finally:
        module._parameters, module._buffers = own_parameters, own_buffers


def _rows(value: Any, dim: int | None, rows: Tensor) -> Any:
    return value if dim is None else value.index_select(dim, rows)


def _replace(output: Any, passage: Passage, owned: _Owned, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`output` with the adapter's rows replaced by what its effect gives there."""
    if isinstance(output, Tensor):
        dim = passage.outputs[0]
        own = owned.effect(output.index_select(dim, owned.rows), args, kwargs)
        return output.index_copy(dim, owned.rows, own.to(output.dtype))
    before = tuple(_rows(part, passage.outputs[place], owned.rows) for place, part in enumerate(output))
    own = owned.effect(before, args, kwargs)
    return tuple(
        part.index_copy(passage.outputs[place], owned.rows, own[place].to(part.dtype))
        for place, part in enumerate(output)
    )
