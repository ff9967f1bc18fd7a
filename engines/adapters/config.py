"""PEFT's adapter_config.json -> LoraConfig, or a refusal that names the field. Nothing in the file is ignored."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from loraplex.engines.errors import AdapterInvalid, AdapterUnsupported

# Fields that do not change what a trained adapter computes.
_WITHOUT_MEANING = frozenset(
    {"auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "task_type"}
    | {"peft_version", "eva_config", "fan_in_fan_out", "megatron_core", "ensure_weight_tying", "runtime_config"}
    | {"qalora_group_size"}
)
_UNDERSTOOD = frozenset(
    {"peft_type", "bias", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"}
    | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"}
)
_MATCH_SECONDS = 0.1
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

    def targets(self, module: str) -> bool:
        """Whether the config's patterns name this module, as PEFT's `check_target_module_exists` decides it."""
        if self.exclude_modules and _names(self.exclude_modules, module):
            return False
        if not _names(self.target_modules, module):
            return False
        if self.layers_to_transform is None or isinstance(self.target_modules, str):
            return True
        layer = self._layer_of(module)
        return layer is not None and layer in self.layers_to_transform

    def rank_of(self, module: str) -> int:
        return int(_pattern_value(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """alpha / r, or alpha / √r with rank-stabilised LoRA (arXiv 2312.03732)."""
        rank = self.rank_of(module)
        alpha = _pattern_value(self.alpha_pattern, module, self.alpha)
        return float(alpha) / (rank**0.5 if self.use_rslora else rank)

    def _layer_of(self, module: str) -> int | None:
        patterns = [rf"(?:^|.*?\.)(?:{name})\.(\d+)\." for name in self.layers_pattern]
        found = (_match(pattern, module) for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."])
        match = next((match for match in found if match), None)
        return int(match.groups()[-1]) if match else None


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
    return LoraConfig(
        rank=_typed(raw, "r", int, 8),
        alpha=float(_typed(raw, "lora_alpha", (int, float), 8)),
        use_rslora=_typed(raw, "use_rslora", bool, False),
        use_dora=_typed(raw, "use_dora", bool, False),
        rank_pattern=_pattern(raw, "rank_pattern"),
        alpha_pattern=_pattern(raw, "alpha_pattern"),
        target_modules=_module_names(raw, "target_modules"),
        exclude_modules=_module_names(raw, "exclude_modules"),
        layers_to_transform=_layers(raw),
        layers_pattern=tuple(_listed(raw.get("layers_pattern"))),
    )


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise AdapterUnsupported(f"peft_type is {kind!r}; only LORA adapters can be served")
    if raw.get("bias", "none") != "none":
        raise AdapterUnsupported(f"bias = {raw['bias']!r} is not supported; train with bias='none'")
    init = raw.get("init_lora_weights", True)
    if str(init).lower() not in _HARMLESS_INITS:
        raise AdapterUnsupported(
            f"init_lora_weights = {init!r} changed the base model's weights; convert the adapter to plain LoRA when "
            "saving it (path_initial_model_for_weight_conversion)"
        )
    for field, value in raw.items():
        if field not in _WITHOUT_MEANING | _UNDERSTOOD and value not in (None, False, {}, [], 0):
            raise AdapterUnsupported(f"{field} = {value!r} is not supported")


def _typed(raw: dict[str, Any], field: str, kind: Any, default: Any) -> Any:
    value = raw.get(field, default)
    if not isinstance(value, kind) or (kind is not bool and (isinstance(value, bool) or value <= 0)):
        raise AdapterInvalid(f"{field} = {value!r} is not valid")
    return value


def _pattern(raw: dict[str, Any], field: str) -> dict[str, Any]:
    value = raw.get(field) or {}
    if not isinstance(value, dict) or not all(
        isinstance(number, int | float) and not isinstance(number, bool) and number > 0 for number in value.values()
    ):
        raise AdapterInvalid(f"{field} = {value!r} is not a map of module patterns to positive numbers")
    for pattern in value:
        _check_regex(field, pattern)
    return value


def _module_names(raw: dict[str, Any], field: str) -> str | tuple[str, ...]:
    value = raw.get(field)
    if isinstance(value, str):
        if value == "all-linear":
            raise AdapterUnsupported(f"{field} = 'all-linear' was not resolved when the adapter was saved")
        _check_regex(field, value)
        return value
    return tuple(_listed(value))


def _layers(raw: dict[str, Any]) -> tuple[int, ...] | None:
    value = raw.get("layers_to_transform")
    layers = [value] if isinstance(value, int) else value
    if layers is None:
        return None
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        raise AdapterInvalid(f"layers_to_transform = {value!r} is not a list of layer numbers")
    return tuple(layers) or None


def _listed(value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else value or []
    if not isinstance(values, list) or not all(isinstance(name, str) for name in values):
        raise AdapterInvalid(f"{value!r} is not a list of module names")
    return values


def _check_regex(field: str, pattern: str) -> None:
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise AdapterInvalid(f"{field}: {pattern!r} is not a regular expression: {error}") from error


def _match(pattern: str, module: str) -> regex.Match[str] | None:
    """`re.match` that a hostile pattern cannot turn into an endless loop. Raises AdapterInvalid."""
    try:
        return regex.match(pattern, module, timeout=_MATCH_SECONDS)
    except TimeoutError as error:
        raise AdapterInvalid(f"the pattern {pattern!r} takes too long to match") from error


def _names(patterns: str | tuple[str, ...], module: str) -> bool:
    if isinstance(patterns, str):
        return _match(rf"(?:{patterns})\Z", module) is not None
    return any(module == name or module.endswith(f".{name}") for name in patterns)


def _pattern_value(patterns: dict[str, Any], module: str, default: float) -> float:
    """The value of the first pattern that ends the module's name, as PEFT's `get_pattern_key` chooses it."""
    return next((value for key, value in patterns.items() if _match(rf"(.*\.)?({key})$", module)), default)
