"""PEFT's adapter_config.json -> LoraConfig, or a refusal that names the field. Nothing in the file is ignored."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loraplex.engines.adapters import patterns
from loraplex.engines.adapters.safetensors_header import shown
from loraplex.engines.errors import AdapterInvalid, AdapterUnsupported

METHODS = ("LORA", "ADALORA")
# Fields that do not change what a trained adapter computes.
_WITHOUT_MEANING = frozenset(
    {"auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "task_type"}
    | {"peft_version", "eva_config", "fan_in_fan_out", "megatron_core", "runtime_config"}
    | {"qalora_group_size"}
)
_UNDERSTOOD = frozenset(
    {"peft_type", "bias", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"}
    | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"}
    | {
        "alora_invocation_tokens",
        "modules_to_save",
        "trainable_token_indices",
        "target_parameters",
        "lora_bias",
        "ensure_weight_tying",
    }
)
# AdaLoRA's (arXiv 2303.10512), which say how the ranks were found, and the two that say which they are.
_OF_ADALORA = frozenset(
    {"target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"} | {"init_r"}
)
_NOT_WITH_ADALORA = ("use_dora", "lora_bias", "target_parameters", "alora_invocation_tokens")
_SINGULAR_VALUES = re.compile(r"(?P<module>.+)\.lora_E(?:\.[^.]+)?")
_EMBEDDINGS = ("embed_tokens", "lm_head")  # the names by which PEFT looks for what to tie
_LARGEST = 2**31  # of ranks and alphas
# Initialisations that leave the base model as it was; the others subtract something from it before training.
_HARMLESS_INITS = frozenset({"true", "false", "gaussian", "eva", "orthogonal", "mica"})


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What PEFT's LoraConfig says about the numbers: ranks, scales and which modules it targets."""

    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    saves_biases: bool
    modules_to_save: tuple[str, ...]
    target_parameters: tuple[str, ...]
    token_ids: dict[str, tuple[int, ...]]
    lora_bias: bool
    invocation: tuple[int, ...]
    ties_weights: bool
    is_adalora: bool
    kept_ranks: dict[str, int]

    def targets(self, module: str) -> bool:
        """Whether the config's patterns name this module, as PEFT's `check_target_module_exists` decides it."""
        if self.exclude_modules and _names(self.exclude_modules, module):
            return False
        if any(patterns.match(patterns.PARENT, saved, module) for saved in self.modules_to_save):
            return False
        if not _names(self.target_modules, module):
            return False
        if self.layers_to_transform is None or isinstance(self.target_modules, str):
            return True
        layer = self._layer_of(module)
        return layer is not None and layer in self.layers_to_transform

    def targets_parameter(self, parameter: str) -> bool:
        """Whether `target_parameters` names this parameter by the end of its name."""
        return any(parameter == name or parameter.endswith(f".{name}") for name in self.target_parameters)

    def active_from(self, prompt: Sequence[int]) -> int:
        """The position from which on the adapter is active: where the last invocation begins; never without one."""
        if not self.invocation:
            return 0
        length = len(self.invocation)
        starts = range(len(prompt) - length, -1, -1)
        return next(
            (start for start in starts if tuple(prompt[start : start + length]) == self.invocation), sys.maxsize
        )

    def saves(self, module: str) -> bool:
        """Whether `modules_to_save` names this module, or one that it is a part of."""
        parents = module.split(".")
        names = (".".join(parents[: length + 1]) for length in range(len(parents)))
        return any(name.endswith(saved) for name in names for saved in self.modules_to_save)

    @property
    def tied(self) -> Literal["", "lora", "saved"]:
        """What of a head that shares the embeddings' weight is theirs as well, by `ensure_weight_tying`."""
        if not self.ties_weights:
            return ""
        if any(name.rpartition(".")[2] in _EMBEDDINGS for name in self.modules_to_save):
            return "saved"
        if isinstance(self.target_modules, str):
            return "lora" if any(_names(self.target_modules, name) for name in _EMBEDDINGS) else ""
        return "lora" if any(name.rpartition(".")[2] in _EMBEDDINGS for name in self.target_modules) else ""

    def token_ids_of(self, embedding: str, *, is_input: bool) -> tuple[int, ...]:
        """The tokens of an embedding whose rows were trained; a plain list means the input embedding's."""
        if is_input and "" in self.token_ids:
            return self.token_ids[""]
        found = (ids for name, ids in self.token_ids.items() if name and _names((name,), embedding))
        return next(found, ())

    def rank_of(self, module: str) -> int:
        if module in self.kept_ranks:
            return self.kept_ranks[module]
        return int(_pattern_value(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """alpha / r, or alpha / √r with rank-stabilised LoRA (arXiv 2312.03732).

        AdaLoRA's is PEFT's: alpha / (r + 1e-5), where r is the rank before any was pruned.
        """
        if self.is_adalora:
            return self.alpha / (self.rank + 1e-5)
        rank = self.rank_of(module)
        alpha = _pattern_value(self.alpha_pattern, module, self.alpha)
        return float(alpha) / (rank**0.5 if self.use_rslora else rank)

    def _layer_of(self, module: str) -> int | None:
        if self.layers_pattern:
            found = (patterns.match(patterns.LAYERS, name, module) for name in self.layers_pattern)
            match = next((match for match in found if match), None)
        else:
            match = patterns.match(patterns.ANY_LAYERS, r"[^.]*", module)
        layer = match["idx"] if match else None  # none where the pattern is several, and matched as the first
        return None if layer is None else int(layer)


def read_config(directory: Path) -> LoraConfig:
    """Parse `adapter_config.json`. Raises AdapterInvalid or AdapterUnsupported, naming the field."""
    path = directory / "adapter_config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterInvalid(f"adapter_config.json cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise AdapterInvalid("adapter_config.json is not a JSON object")
    _refuse_unsupported(raw)
    is_adalora = raw["peft_type"] == "ADALORA"
    return LoraConfig(
        rank=_typed(raw, "init_r", int, 12) if is_adalora else _typed(raw, "r", int, 8),
        alpha=float(_typed(raw, "lora_alpha", (int, float), 8)),
        use_rslora=_typed(raw, "use_rslora", bool, False),
        use_dora=_typed(raw, "use_dora", bool, False),
        rank_pattern={} if is_adalora else _pattern(raw, "rank_pattern", int),
        alpha_pattern=_pattern(raw, "alpha_pattern", (int, float)),
        target_modules=_module_names(raw, "target_modules"),
        exclude_modules=_module_names(raw, "exclude_modules"),
        layers_to_transform=_layers(raw),
        layers_pattern=_part_patterns(raw, "layers_pattern", patterns.LAYERS),
        saves_biases=raw.get("bias", "none") != "none",
        modules_to_save=_part_patterns(raw, "modules_to_save", patterns.PARENT),
        target_parameters=tuple(_listed(raw.get("target_parameters"))),
        token_ids=_token_ids(raw),
        invocation=_invocation(raw),
        lora_bias=_typed(raw, "lora_bias", bool, False),
        ties_weights=_typed(raw, "ensure_weight_tying", bool, False),
        is_adalora=is_adalora,
        kept_ranks=_kept_ranks(raw) if is_adalora else {},
    )


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    kind = raw.get("peft_type")
    if kind not in METHODS:
        raise AdapterUnsupported(f"peft_type is {shown(kind)}; only {' and '.join(METHODS)} adapters can be served")
    understood = _WITHOUT_MEANING | _UNDERSTOOD | (_OF_ADALORA if kind == "ADALORA" else frozenset())
    for field in _NOT_WITH_ADALORA if kind == "ADALORA" else ():
        if raw.get(field):
            raise AdapterUnsupported(f"{field} = {shown(raw[field])} is not supported with peft_type ADALORA")
    if raw.get("bias", "none") not in ("none", "all", "lora_only"):
        raise AdapterInvalid(f"bias = {shown(raw['bias'])} is not one of none, all, lora_only")
    init = raw.get("init_lora_weights", True)
    if init and not isinstance(init, str | bool):
        raise AdapterInvalid(f"init_lora_weights = {shown(init)} is not valid")
    if init and str(init).lower() not in _HARMLESS_INITS:  # PEFT takes null and nought for false
        raise AdapterUnsupported(
            f"init_lora_weights = {shown(init)} changed the base model's weights; convert the adapter to plain LoRA "
            "when saving it (path_initial_model_for_weight_conversion)"
        )
    for field, value in raw.items():
        if field not in understood and value not in (None, False, {}, [], 0):
            name = field if field.isidentifier() and len(field) <= 80 else shown(field)
            raise AdapterUnsupported(f"{name} = {shown(value)} is not supported")


def _typed(raw: dict[str, Any], field: str, kind: Any, default: Any) -> Any:
    value = raw.get(field, default)
    if not isinstance(value, kind) or (kind is not bool and not _is_positive(value)):
        raise AdapterInvalid(f"{field} = {shown(value)} is not valid")
    return value


def _is_positive(number: Any) -> bool:
    """And finite, which JSON as Python reads it need not be; a NaN here would be one in every token."""
    return isinstance(number, int | float) and not isinstance(number, bool) and 0 < number <= _LARGEST


def _pattern(raw: dict[str, Any], field: str, kind: Any) -> dict[str, Any]:
    value = raw.get(field) or {}
    if not isinstance(value, dict) or not all(isinstance(n, kind) and _is_positive(n) for n in value.values()):
        raise AdapterInvalid(f"{field} = {shown(value)} is not a map of module patterns to positive numbers")
    for pattern in value:
        patterns.check(field, pattern, patterns.ENDING)
    return value


def _kept_ranks(raw: dict[str, Any]) -> dict[str, int]:
    """AdaLoRA's `rank_pattern`: for the singular values of each module, which of the `init_r` were kept."""
    value, before = raw.get("rank_pattern") or {}, raw.get("init_r", 12)
    if not isinstance(value, dict):
        raise AdapterInvalid(f"rank_pattern = {shown(value)} is not a map of names to lists")
    ranks: dict[str, int] = {}
    for name, kept in value.items():
        match = _SINGULAR_VALUES.fullmatch(name)
        if match is None or match["module"] in ranks:
            raise AdapterInvalid(f"rank_pattern: {shown(name)} does not name the lora_E of a module, or one twice")
        if not isinstance(kept, list) or len(kept) != before or not all(isinstance(one, bool) for one in kept):
            raise AdapterInvalid(f"rank_pattern: {shown(name)} is not a list of init_r = {shown(before)} booleans")
        ranks[match["module"]] = sum(kept)
    return ranks


def _module_names(raw: dict[str, Any], field: str) -> str | tuple[str, ...]:
    value = raw.get(field)
    if isinstance(value, str):
        if value == "all-linear":
            raise AdapterUnsupported(f"{field} = 'all-linear' was not resolved when the adapter was saved")
        patterns.check(field, value)
        return value
    return tuple(_listed(value))


def _part_patterns(raw: dict[str, Any], field: str, wrapped: str) -> tuple[str, ...]:
    """Names that PEFT reads as parts of patterns; an empty text is none."""
    names = _listed(raw.get(field) or None)
    for name in names:
        patterns.check(field, name, wrapped)
    return tuple(names)


def _invocation(raw: dict[str, Any]) -> tuple[int, ...]:
    """`alora_invocation_tokens` (arXiv 2504.12397)."""
    value = raw.get("alora_invocation_tokens")
    if value is None:
        return ()
    if not isinstance(value, list) or not value or not all(type(token) is int and token >= 0 for token in value):
        raise AdapterInvalid(f"alora_invocation_tokens = {shown(value)} is not a list of token ids")
    if raw.get("use_dora"):
        raise AdapterUnsupported("use_dora = True is not supported with alora_invocation_tokens")
    return tuple(value)


def _token_ids(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """`trainable_token_indices`, by the embedding's name; `""` is the input embedding."""
    value = raw.get("trainable_token_indices") or {}
    by_name = value if isinstance(value, dict) else {"": value}
    for ids in by_name.values():
        if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
            raise AdapterInvalid("trainable_token_indices holds something else than lists of token ids")
        if len(set(ids)) < len(ids):
            raise AdapterInvalid("trainable_token_indices names a token twice")
    return {name: tuple(ids) for name, ids in by_name.items()}


def _layers(raw: dict[str, Any]) -> tuple[int, ...] | None:
    value = raw.get("layers_to_transform")
    layers = [value] if isinstance(value, int) else value
    if layers is None:
        return None
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        raise AdapterInvalid(f"layers_to_transform = {shown(value)} is not a list of layer numbers")
    return tuple(layers) or None


def _listed(value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else value or []
    if not isinstance(values, list) or not all(isinstance(name, str) for name in values):
        raise AdapterInvalid(f"{shown(value)} is not a list of module names")
    return values


def _names(names: str | tuple[str, ...], module: str) -> bool:
    if isinstance(names, str):
        return patterns.match(patterns.WHOLE, names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _pattern_value(values: dict[str, Any], module: str, default: float) -> float:
    """The value of the first pattern that ends the module's name, as PEFT's `get_pattern_key` chooses it."""
    return next((value for key, value in values.items() if patterns.match(patterns.ENDING, key, module)), default)
