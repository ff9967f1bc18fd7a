"""What an adapter brings beside A and B of linear layers: biases, whole modules, embeddings, tokens, experts.

PEFT's `bias`, `lora_bias`, `modules_to_save`, `trainable_token_indices`, `target_parameters` and LoRA on embeddings all
become `Extra`s: tensors in the adapter's extent, and what is to be done with them at one module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from loraplex.engines.adapters import pieces
from loraplex.engines.adapters.config import LoraConfig
from loraplex.engines.adapters.copies import are_equal, are_same
from loraplex.engines.adapters.pieces import Pieces
from loraplex.engines.adapters.tensor_names import claim
from loraplex.engines.errors import AdapterInvalid, AdapterMismatch, AdapterTooLarge, AdapterUnsupported

Shape = tuple[int, ...]
_BASE_LAYER = ".base_layer"
_TOKENS = "token_adapter.trainable_tokens_delta"
_NEW, _REPLACED = ".modules_to_save.", ".original_module."


@dataclass(frozen=True, slots=True)
class Span:
    """A tensor in an adapter's extent, contiguous from `offset` on, in elements."""

    offset: int
    shape: Shape

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.offset : self.offset + _numel(self.shape)].view(self.shape)


@dataclass(frozen=True, slots=True)
class Extra:
    """One thing to do at one module, for the adapter's tokens, behind what the layer and its LoRA give.

    bias: add `delta`, Shape [out].
    swap: compute the module with `new` in the place of `parameter`.
    parameter: compute it with `parameter` + scale · B·A; a: Shape [E · rank, in]; b: Shape [out, rank · E], as in PEFT.
    embedding: add scale · A[:, id]·B; a: Shape [vocabulary, rank]; b: Shape [rank, width].
    tokens: the embedding of `token_ids[i]` is `rows[i]`; head: so is its row of the head. rows: Shape [N, width].
    """

    kind: Literal["bias", "swap", "parameter", "embedding", "tokens", "head"]
    module: str
    spans: dict[str, Span]
    parameter: str = ""
    scale: float = 1.0
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ExtraPlan:
    """The extras, and where each comes from: `sources[i]` has span name -> tensor name.

    What a tied head takes from the embeddings has no source of its own. `copies` are tensors that must equal the
    base's: tensor name -> the base's parameter; `twins` must equal another of the file's, `turned` another's transpose.
    """

    extras: tuple[Extra, ...]
    sources: tuple[dict[str, str], ...]
    copies: dict[str, str]
    twins: dict[str, str]
    turned: dict[str, str]
    size: int

    @property
    def num_parameters(self) -> int:
        """Of what the file has."""
        own = (extra for extra, sources in zip(self.extras, self.sources, strict=True) if sources)
        return sum(_numel(span.shape) for extra in own for span in extra.spans.values())


class ExtraBase(Protocol):
    """What planning asks of the base model; see `peft.Base`."""

    @property
    def modules(self) -> Mapping[str, object]: ...
    @property
    def unfit(self) -> Mapping[str, str]: ...
    @property
    def parameters(self) -> Mapping[str, Shape]: ...
    @property
    def embeddings(self) -> Mapping[str, Shape]: ...
    @property
    def input_embedding(self) -> str: ...
    @property
    def tied_head(self) -> str | None: ...
    @property
    def transposed(self) -> frozenset[str]: ...
    @property
    def max_rank(self) -> int: ...


class ExtraPlanner:
    """Takes tensors of the file one feature after the other; what is left over at the end belongs to none."""

    def __init__(
        self, config: LoraConfig, shapes: Mapping[str, Shape], base: ExtraBase, offset: int, align: Callable[[int], int]
    ) -> None:
        """`shapes` are the tensors that are no LoRA on a linear layer, their names without PEFT's prefix."""
        self._config, self._base, self._align = config, base, align
        self._left = dict(shapes)
        self._size = offset
        self._extras: list[Extra] = []
        self._sources: list[dict[str, str]] = []
        self._copies: dict[str, str] = {}
        self._twins: dict[str, str] = {}
        self._turned: dict[str, str] = {}
        self._whole: dict[str, str] = {}

    def plan(self, adapted: frozenset[str]) -> ExtraPlan:
        """`adapted`: the linear layers that the adapter has A and B for. Raises AdapterError."""
        for parameter in [name for name in self._base.parameters if self._config.targets_parameter(name)]:
            self._parameter(parameter)
        for module, shape in self._base.embeddings.items():
            if self._config.targets(module):
                adapted |= {module}
                self._embedding(module, shape)
                if module == self._base.input_embedding and self._base.tied_head is not None:
                    self._tie_lora(module, self._base.tied_head, adapted)
            self._tokens(module, shape, adapted)
        self._head_tokens(adapted)
        for module in adapted:
            if f"{module}.lora_B.bias" in self._left:
                self._lora_bias(module)
        for name in list(self._left):
            self._told_twice(name)
        if self._base.tied_head is not None and self._config.tied == "saved":
            self._saved_and_tied(self._base.tied_head)
        for name in list(self._left):
            self._saved(name, adapted)
        self._require_saved()
        extras, sources = tuple(self._extras), tuple(self._sources)
        return ExtraPlan(extras, sources, self._copies, self._twins, self._turned, self._size)

    def _add(self, extra: Extra, sources: dict[str, str]) -> None:
        self._extras.append(extra)
        self._sources.append(sources)

    def _span(self, shape: Shape) -> Span:
        span = Span(self._size, shape)
        self._size += self._align(_numel(shape))
        return span

    def _take(self, tensor: str, shape: Shape) -> str:
        """Raises AdapterInvalid where the file lacks the tensor, AdapterMismatch where its shape is another."""
        found = self._left.pop(tensor, None)
        if found is None:
            raise AdapterInvalid(f"the file lacks {tensor}")
        if found != shape:
            raise AdapterMismatch(f"{tensor} has shape {list(found)}; the base needs {list(shape)}")
        return tensor

    def _rank(self, name: str) -> int:
        rank = self._config.rank_of(name)
        if rank > self._base.max_rank:
            raise AdapterTooLarge(f"rank {rank} of {name} exceeds adapters.max_rank = {self._base.max_rank}")
        return rank

    def _parameter(self, name: str) -> None:
        """PEFT wraps a module once for each parameter it targets, the first one innermost."""
        module, _, own = name.rpartition(".")
        siblings = [other for other in self._base.parameters if other.rpartition(".")[0] == module
                    and self._config.targets_parameter(other)]  # fmt: skip
        prefix = module + _BASE_LAYER * (len(siblings) - 1 - siblings.index(name))
        shape, rank = self._base.parameters[name], self._rank(name)
        if len(shape) not in (2, 3):
            raise AdapterUnsupported(f"target_parameters names {name}, which has {len(shape)} dimensions")
        experts = shape[0] if len(shape) == 3 else 1
        width_in, width_out = (shape[-2], shape[-1]) if name in self._base.transposed else (shape[-1], shape[-2])
        a, b = (experts * rank, width_in), (width_out, rank * experts)
        sources = {"a": self._take(f"{prefix}.lora_A.weight", a), "b": self._take(f"{prefix}.lora_B.weight", b)}
        spans = {"a": self._span(a), "b": self._span(b)}
        self._add(Extra("parameter", module, spans, own, self._config.scale_of(name)), sources)

    def _embedding(self, module: str, shape: Shape) -> None:
        if self._config.use_dora:
            raise AdapterUnsupported(f"use_dora on the embedding {module} is not supported")
        rank = self._rank(module)
        sources = {
            "a": self._take(f"{module}.lora_embedding_A", (rank, shape[0])),
            "b": self._take(f"{module}.lora_embedding_B", (shape[1], rank)),
        }
        spans = {"a": self._span((shape[0], rank)), "b": self._span((rank, shape[1]))}
        self._add(Extra("embedding", module, spans, scale=self._config.scale_of(module)), sources)

    def _tie_lora(self, embedding: str, head: str, adapted: frozenset[str]) -> None:
        """With `ensure_weight_tying` the head's A is the embedding's Bᵀ, its B the embedding's Aᵀ, told twice."""
        if self._config.tied != "lora":
            return
        if head not in adapted:
            raise AdapterInvalid(f"ensure_weight_tying ties {head}, for which the file has no weights")
        if self._config.token_ids_of(embedding, is_input=True):
            raise AdapterUnsupported(f"trainable_token_indices beside a LoRA on {embedding}, tied, is not supported")
        self._turned[f"{head}.lora_A"] = f"{embedding}.lora_embedding_B"
        self._turned[f"{head}.lora_B"] = f"{embedding}.lora_embedding_A"

    def _tokens(self, module: str, shape: Shape, adapted: frozenset[str]) -> None:
        is_input = module == self._base.input_embedding
        if not (token_ids := self._config.token_ids_of(module, is_input=is_input)):
            return
        rows, spans, sources = self._rows(module, shape, token_ids)
        self._add(Extra("tokens", module, spans, token_ids=token_ids), sources)
        if is_input and self._base.tied_head is not None and self._is_tied(self._base.tied_head, token_ids):
            self._require_plain(self._base.tied_head, adapted)
            if (twin := f"{self._base.tied_head}.{_TOKENS}") in self._left:  # in a whole state dict
                self._twins[self._take(twin, rows)] = sources["rows"]
            self._add(Extra("head", self._base.tied_head, spans, token_ids=token_ids), {})

    def _rows(
        self, module: str, shape: Shape, token_ids: tuple[int, ...]
    ) -> tuple[Shape, dict[str, Span], dict[str, str]]:
        """Trained rows of a weight: their shape, where they go and where they come from."""
        if max(token_ids) >= shape[0]:
            raise AdapterMismatch(f"trainable_token_indices names token {max(token_ids)}; {module} has {shape[0]}")
        rows = (len(token_ids), shape[1])
        sources = {"rows": self._take(f"{module}.{_TOKENS}", rows)}
        return rows, {"rows": self._span(rows)}, sources

    def _is_tied(self, head: str, token_ids: tuple[int, ...]) -> bool:
        """Whether the rows of a tied head are the embeddings', which they are not where it is told other tokens."""
        own = [ids for name, ids in self._config.token_ids.items() if name and f".{head}".endswith(f".{name}")]
        if own in ([], [token_ids]):
            return True
        if self._config.ties_weights:
            raise AdapterInvalid(
                f"trainable_token_indices names other tokens for {head}, which ensure_weight_tying ties"
            )
        return False

    def _head_tokens(self, adapted: frozenset[str]) -> None:
        """Trained rows of a head's own, which PEFT has beside no LoRA. Raises AdapterError."""
        embedding = self._base.input_embedding
        shape, theirs = self._base.embeddings.get(embedding), self._config.token_ids_of(embedding, is_input=True)
        embeddings = self._base.embeddings.keys() | {name.rpartition(".")[2] for name in self._base.embeddings} | {""}
        for name in sorted(self._config.token_ids.keys() - embeddings):
            heads = [module for module in self._base.modules if f".{module}".endswith(f".{name}")
                     and self._base.parameters.get(f"{module}.weight") == shape]  # fmt: skip
            if shape is None or not heads:
                raise AdapterUnsupported(f"trainable_token_indices names {name}, which is no embedding and no head")
            token_ids = self._config.token_ids[name]
            for head in heads:
                if token_ids and not (head == self._base.tied_head and theirs == token_ids):
                    self._require_plain(head, adapted)
                    if head in adapted:
                        raise AdapterUnsupported(f"trainable_token_indices names {head}, which has a LoRA as well")
                    _, spans, sources = self._rows(head, shape, token_ids)
                    self._add(Extra("head", head, spans, token_ids=token_ids), sources)

    def _require_plain(self, head: str, adapted: frozenset[str]) -> None:
        """Raises AdapterUnsupported where a head with trained rows has more than B·A beside it."""
        if self._config.use_dora and head in adapted:
            raise AdapterUnsupported(f"use_dora = True on {head}, which trainable_token_indices changes as well")
        if self._config.targets_parameter(f"{head}.weight"):
            raise AdapterUnsupported(
                f"target_parameters names {head}.weight, which trainable_token_indices changes as well"
            )

    def _lora_bias(self, module: str) -> None:
        if not self._config.lora_bias:
            raise AdapterInvalid(f"{module} has lora_B.bias, but lora_bias is not set")
        shape = self._base.parameters.get(f"{module}.bias", self._left[f"{module}.lora_B.bias"])
        sources = {"delta": self._take(f"{module}.lora_B.bias", shape)}
        self._add(Extra("bias", module, {"delta": self._span(shape)}, scale=self._config.scale_of(module)), sources)

    def _told_twice(self, tensor: str) -> None:
        """What PEFT writes of an embedding in `modules_to_save` beside its weight, with save_embedding_layers: the
        weight once more, and what the base had in its place."""
        for infix, others in ((_NEW, self._left), (_REPLACED, self._base.parameters)):
            module, found, own = tensor.partition(infix)
            name = f"{module}.{own}"
            if not (found and name in others and name in self._base.parameters and self._saves(module)):
                continue
            self._require_vocabulary(tensor, module, name)
            (self._twins if infix == _NEW else self._copies)[self._take(tensor, others[name])] = name

    def _saves(self, module: str) -> bool:
        return self._config.saves(module) or (self._config.tied == "saved" and module == self._base.tied_head)

    def _saved_and_tied(self, head: str) -> None:
        """Embeddings of `modules_to_save` whose weight is the head's as well, by `ensure_weight_tying`."""
        name, tied = f"{self._base.input_embedding}.weight", f"{head}.weight"
        shape = self._base.parameters[name]
        for tensor in {name, tied} & self._left.keys():
            self._require_vocabulary(tensor, self._base.input_embedding, name)
        source = self._take(name, shape)
        self._twins[self._take(tied, shape)] = source
        new = {"new": self._span(shape)}
        self._add(Extra("swap", self._base.input_embedding, new, "weight"), {"new": source})
        self._add(Extra("swap", head, new, "weight"), {})

    def _require_vocabulary(self, tensor: str, module: str, name: str) -> None:
        """Raises AdapterUnsupported where it has a row for each token, and there are other tokens."""
        found, shape = self._left[tensor], self._base.parameters[name]
        is_vocabulary = shape[:1] == self._base.embeddings.get(self._base.input_embedding, ())[:1]
        is_embedding = module in (self._base.input_embedding, self._base.tied_head)
        if found != shape and (is_embedding or (is_vocabulary and found[1:] == shape[1:])):
            raise AdapterUnsupported(
                f"{tensor} has {found[0]} rows, the base {shape[0]}: another vocabulary is not supported"
            )

    def _saved(self, tensor: str, adapted: frozenset[str]) -> None:
        """A whole parameter: of `modules_to_save`, a bias, or a copy of an embedding beside its LoRA."""
        name = tensor.replace(_BASE_LAYER, "")
        module, _, own = name.rpartition(".")
        if module in self._base.unfit:
            raise AdapterUnsupported(f"{module} cannot be adapted: in this model it {self._base.unfit[module]}")
        if name not in self._base.parameters:
            raise AdapterUnsupported(f"tensor {tensor} is not part of a LoRA that this base can carry")
        claim(self._whole, name, tensor)
        is_saved, is_bias = self._config.saves(module), "bias" in own and self._config.saves_biases
        if module in adapted and not is_bias:
            self._copies[self._take(tensor, self._base.parameters[name])] = name
            return
        shape = self._base.parameters[name]
        self._require_vocabulary(tensor, module, name)
        if not (is_saved or is_bias):
            self._copies[self._take(tensor, shape)] = name
            return
        kind: Literal["bias", "swap"] = (
            "bias" if own == "bias" and not is_saved and module in self._base.modules else "swap"
        )
        part = "delta" if kind == "bias" else "new"
        self._add(Extra(kind, module, {part: self._span(shape)}, own), {part: self._take(tensor, shape)})

    def _require_saved(self) -> None:
        """Raises AdapterError where a module of `modules_to_save` has no weights, or no token passes it."""
        have = {f"{extra.module}.{extra.parameter}" for extra in self._extras if extra.kind == "swap"}
        for name in self._base.parameters:
            if self._config.saves(name.rpartition(".")[0]) and name not in have:
                raise AdapterInvalid(f"modules_to_save names the module of {name}, for which the file has no weights")
        for saved in self._config.modules_to_save:
            modules = [name.rpartition(".")[0] for name in have]
            if not any(f".{module}.".find(f"{saved}.") >= 0 for module in modules):
                raise AdapterUnsupported(f"modules_to_save names {saved}, which the base does not use")


def read_extras(
    plan: ExtraPlan, flat: Tensor, tensor: Callable[[str], Tensor], base: Callable[[str], Tensor]
) -> Pieces[None]:
    """Read the extras into `flat`. `tensor` reads the file's, `base` the model's. Raises AdapterError."""
    for extra, sources in zip(plan.extras, plan.sources, strict=True):
        for part, source in sources.items():
            value = tensor(source)
            if extra.kind == "embedding":
                value = value.t()
            elif extra.kind == "bias" and extra.parameter:  # the whole bias, not what lora_bias adds
                value = value.float() - base(f"{extra.module}.{extra.parameter}").float().cpu()
            elif extra.kind == "bias":
                value = value.float() * extra.scale
            yield from pieces.copy(extra.spans[part].of(flat), value)
    for source, name in plan.copies.items():
        if not (yield from are_same(tensor(source), base(name))):
            raise AdapterUnsupported(
                f"{source} differs from the base's: an adapter over other weights is not supported"
            )
    for source, other in plan.twins.items():
        if not (yield from are_equal(tensor(source), tensor(other))):
            raise AdapterInvalid(f"{source} differs from {other}, which says the same weights")
    for source, other in plan.turned.items():
        if not (yield from are_equal(tensor(source), tensor(other).t())):
            raise AdapterInvalid(f"{source} differs from {other}, which ensure_weight_tying says it is")


def _numel(shape: Shape) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel
