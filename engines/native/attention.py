"""The attention function that transformers calls in every layer, over our paged KV cache.

Registered with `transformers.AttentionInterface`, it needs nothing of the model but that it calls in the same order
in every step: the n-th call has the n-th cache, whatever the layer calls itself and however often it calls. The step is
set on the object beforehand, so models that drop keyword arguments on the way are carried as well.
Tokens of all sequences come packed in one row. New keys and values are written to the cache, then the tokens of short
segments are attended together and each longer segment on its own.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface

from loraplex.engines.native import compiled_ops
from loraplex.engines.native.chunks import is_faster
from loraplex.engines.native.device_attention import KernelStep
from loraplex.kernels.attention import cpu_decode, cpu_prefill
from loraplex.kernels.attention.cpu_decode import DecodeRows, write
from loraplex.kernels.attention.cpu_prefill import PrefillRuns
from loraplex.kernels.attention.paged import Form, attend, attend_chunk, attend_decode, causal_mask, chunk_mask


@dataclass(frozen=True, slots=True)
class Prefill:
    """One segment of several tokens: rows `begin … end − 1` of the step, at positions `start …`; `slots`: Shape [L]."""

    begin: int
    end: int
    start: int
    slots: Tensor


@dataclass(frozen=True, slots=True)
class Decodes:
    """B tokens that are attended together. rows, lengths: Shape [B]. slots: Shape [B, L], padded with the row of zeros.

    `in_place`: the same, for the kernel that gathers nothing.
    """

    rows: Tensor
    slots: Tensor
    lengths: Tensor
    in_place: DecodeRows


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """Where a step's tokens go in the cache (`slots`: Shape [T]) and what each may look at.

    `one_by_one`: what each of the tokens of `prefills`, decodes among them, gets depends on its position alone; rows
    that are in none of them are padding. `each` are all rows, for the kernel that has this property.
    """

    slots: Tensor
    decodes: Decodes | None
    prefills: tuple[Prefill, ...]
    one_by_one: bool = False
    each: DecodeRows | None = None
    runs: PrefillRuns | None = None
    masks: dict[tuple[int, int | None, bool], Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class KvShape:
    """Numbers a token leaves in one layer's cache: key and value heads × width."""

    num_heads: int
    key_width: int
    value_width: int


class ForeignAttention(Exception):
    """A layer attends to something else than the tokens of its sequence."""


class PagedAttention:
    """Callable of `transformers.AttentionInterface`. Before `end_notes` it notes what each call asks for.

    `name` is its own, under which transformers knows it. `shapes[n]` and `windows[n]` are those of the n-th call of a
    step, `layers[n]` the number of the layer that made it.
    """

    _numbers = itertools.count()

    def __init__(self) -> None:
        self.name = f"loraplex_paged_{next(self._numbers)}"
        AttentionInterface.register(self.name, _interface(self))
        self.shapes: list[KvShape] = []
        self.windows: list[int | None] = []
        self.layers: list[int | None] = []
        self.own_masks = False  # whether some layer brought a mask of its own making
        self.intercepts = False
        self._takes_notes = True
        self._step: AttentionStep | KernelStep | None = None
        self._call = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self.reads_in_place = False  # whether tokens here and there of a sequence cost no copy of what they look at
        self.attends_runs = False  # whether a kernel attends chunks of prompts, all of a step in one call

    def intercepting(self) -> AbstractContextManager[object]:
        """Within it the model's calls of torch's own attention come here, where it knows no other way."""
        return _Interception(self) if self.intercepts else nullcontext()

    def end_notes(self) -> None:
        """The model was run once, so its calls are known: a later run outside of steps adds none."""
        self._takes_notes = False

    def begin(self, step: AttentionStep | KernelStep) -> None:
        """Set the step that the calls from now on belong to."""
        self._step = step
        self._call = 0

    def allocate(self, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make the cache: for each call noted `num_slots` rows of keys and of values.

        One more row, number `num_slots`, is never written: what is padded reads its zeros, not another sequence's
        leavings, for a weight of zero does not take the harm out of a NaN. And another one behind it is never read:
        what is padding is written there.
        """
        for shape in self.shapes:
            self._keys.append(_zeros((num_slots + 2, shape.num_heads, shape.key_width), dtype, device))
            self._values.append(_zeros((num_slots + 2, shape.num_heads, shape.value_width), dtype, device))
        self.reads_in_place, self.attends_runs = (
            all(kernel.is_available(dtype, device, shape.key_width, shape.value_width) for shape in self.shapes)
            for kernel in (cpu_decode, cpu_prefill)
        )
        self.attends_runs = self.attends_runs and all(
            is_faster(shape.num_heads, shape.key_width, shape.value_width, dtype) for shape in {*self.shapes}
        )

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        """query: Shape [1, H, T, D]. key: Shape [1, Hk, T, D]. value: Shape [1, Hk, T, Dv]. Result: [1, T, H, Dv]."""
        form = Form(scaling or query.shape[-1] ** -0.5, sliding_window, softcap, s_aux)
        if self._step is None:
            if query.shape[2] != key.shape[2]:
                raise ForeignAttention(f"{type(module).__name__} attends to something else than the sequence's tokens")
            if self._takes_notes:
                self.own_masks |= attention_mask is not None
                self.layers.append(getattr(module, "layer_idx", None))
                self.shapes.append(KvShape(key.shape[1], key.shape[3], value.shape[3]))
                self.windows.append(form.window)
            mask = causal_mask(0, query.shape[2], form.window, query.device)
            return attend(query, key, value, mask, form).transpose(1, 2), None
        step, call = self._step, self._call
        self._call += 1
        keys, values = self._keys[call], self._values[call]
        if isinstance(step, KernelStep):
            return step.attend(query, key, value, keys, values, form)[None], None
        for numbers, cache in ((key, keys), (value, values)):
            if self.reads_in_place:
                write(numbers[0], cache, step.slots)
            else:
                cache.index_copy_(0, step.slots, numbers[0].transpose(0, 1))
        if step.each is not None:
            return step.each.attend(query[0].transpose(0, 1), keys, values, form)[None], None
        if step.one_by_one:
            return _attend_each(query, keys, values, form, step)[None], None
        if step.decodes is not None and not step.prefills:
            return self._decode(query[0].transpose(0, 1), keys, values, form, step)[None], None
        out = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
        if step.decodes is not None:
            rows = step.decodes.rows
            out[rows] = self._decode(query[0, :, rows].transpose(0, 1), keys, values, form, step)
        if step.runs is not None and form.scale > 0:
            step.runs.attend(query[0], keys, values, form, out)
            return out[None], None
        for prefill in step.prefills:
            own = slice(prefill.begin, prefill.end)
            if prefill.start == 0 and sliding_window is None and softcap is None and s_aux is None:
                grouped = query.shape[1] != key.shape[1]
                part = functional.scaled_dot_product_attention(
                    query[:, :, own], key[:, :, own], value[:, :, own],
                    is_causal=True, scale=form.scale, enable_gqa=grouped,
                )  # fmt: skip
            else:
                part = _prefill(query[:, :, own], keys, values, form, prefill, step)
            out[own] = part[0].transpose(0, 1)
        return out[None], None

    def _decode(self, query: Tensor, keys: Tensor, values: Tensor, form: Form, step: AttentionStep) -> Tensor:
        """query: Shape [B, H, D]. Result: Shape [B, H, Dv]."""
        decodes = step.decodes
        assert decodes is not None
        if self.reads_in_place:
            return decodes.in_place.attend(query, keys, values, form)
        batch, longest = decodes.slots.shape
        slots = decodes.slots.view(-1)
        mask = step.masks.get((-1, form.window, False))
        if mask is None:
            mask = _decode_mask(decodes, form.window)
            step.masks[-1, form.window, False] = mask
        k = keys.index_select(0, slots).view(batch, longest, *keys.shape[1:])
        v = values.index_select(0, slots).view(batch, longest, *values.shape[1:])
        return attend_decode(query.contiguous(), k, v, mask, form)


def _interface(attention: PagedAttention) -> Callable[..., tuple[Tensor, None]]:
    """What transformers calls: it does not keep the attention alive, which lives as long as its runner."""
    proxy, handle = weakref.proxy(attention), compiled_ops.handle_of(attention)

    def attend(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if is_dynamo_compiling():
            return _attend_in_graph(handle, *args, **kwargs), None
        out: tuple[Tensor, None] = proxy(*args, **kwargs)
        return out

    return attend


def _attend_in_graph(
    handle: Tensor,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> Tensor:
    """The call of the operation; arguments as those of `PagedAttention`."""
    out: Tensor = compiled_ops.attend(query, key, value, handle, scaling, sliding_window, softcap, s_aux)
    return out


class _Interception(TorchFunctionMode):
    """Models that call `scaled_dot_product_attention` themselves, as Falcon does, are carried by catching the call.

    A boolean mask says what is causal, which is known here; one of numbers adds to the scores, and shows in the trial.
    """

    def __init__(self, attention: PagedAttention) -> None:
        super().__init__()
        self._attention = attention

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
        mask = None if mask is not None and mask.dtype == torch.bool else mask
        out, _ = self._attention(_NO_MODULE, args[0], args[1], args[2], mask, kwargs.get("scale"))
        return out.transpose(1, 2)


_NO_MODULE = nn.Module()


def _attend_each(query: Tensor, keys: Tensor, values: Tensor, form: Form, step: AttentionStep) -> Tensor:
    """query: Shape [1, H, T, D]. Result: Shape [T, H, Dv], zeros in rows of padding."""
    out = query.new_zeros(query.shape[2], query.shape[1], values.shape[-1])
    for prefill in step.prefills:
        k, v = keys.index_select(0, prefill.slots)[None], values.index_select(0, prefill.slots)[None]
        for row in range(prefill.begin, prefill.end):
            end = prefill.start + row - prefill.begin + 1
            own = slice(0 if form.window is None else max(end - form.window, 0), end)
            mask = torch.ones(1, own.stop - own.start, dtype=torch.bool, device=query.device)
            out[row] = attend_decode(query[:, :, row].contiguous(), k[:, own], v[:, own], mask, form)[0]
    return out


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the CPU the memory is mapped when it is first written: torch.zeros would touch all of it at start."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)


def _prefill(query: Tensor, keys: Tensor, values: Tensor, form: Form, prefill: Prefill, step: AttentionStep) -> Tensor:
    mask = step.masks.get((prefill.begin, form.window, form.is_plain))
    if mask is None:
        mask = chunk_mask(prefill.start, prefill.end - prefill.begin, form, query)
        step.masks[prefill.begin, form.window, form.is_plain] = mask
    return attend_chunk(query, keys, values, prefill.slots, mask, form)


def _decode_mask(decodes: Decodes, window: int | None) -> Tensor:
    """Shape [B, L]: True where position j < length, and within the window of the last one."""
    positions = torch.arange(decodes.slots.shape[1], device=decodes.lengths.device)[None, :]
    lengths = decodes.lengths[:, None]
    mask = positions < lengths
    if window is not None:
        mask &= positions >= lengths - window
    return mask
