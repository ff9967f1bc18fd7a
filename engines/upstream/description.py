"""What an upstream serves, by its list of models and the base's config.json here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from loraplex.config.settings import Adapters, Model, Settings
from loraplex.engines.context_length import stated_positions
from loraplex.engines.errors import EngineUnavailable, ModelNotServable
from loraplex.engines.native.defaults import sampling_defaults
from loraplex.engines.protocol import EngineInfo, SamplingDefaults

OURS = "loraplex"  # who owns models, where the upstream is a server of this kind


# What of these tables means something to this engine, or to the gateway before any.
_OF_EFFECT: tuple[tuple[str, frozenset[str]], ...] = (
    ("engine", frozenset({"kind", "max_running", "max_waiting", "max_wait_seconds", "unresponsive_seconds"})),
    ("model", frozenset(Model.__struct_fields__) - {"dtype", "quantization", "device", "random_weights"}),
    (
        "adapters",
        frozenset(Adapters.__struct_fields__)
        - {"host_bytes", "device_bytes", "device_share", "pinned_share", "tenant_pinned_share"},
    ),
)


class ServedModel(msgspec.Struct):
    """One entry of /v1/models; an adapter has a `parent`."""

    id: str
    parent: str | None = None
    owned_by: str = ""
    max_model_len: int | None = None


class ServedModels(msgspec.Struct):
    data: list[ServedModel]


def refuse_without_effect(settings: Settings) -> None:
    """Raises ModelNotServable where something is set that only an engine which computes itself could heed."""
    for section, names in _OF_EFFECT:
        table = getattr(settings, section)
        for field in msgspec.structs.fields(table):
            if field.name not in names and getattr(table, field.name) != field.default:
                raise ModelNotServable(f"{section}.{field.name} has no effect with engine.kind = 'upstream'")


def served_models(said: Any) -> list[ServedModel]:
    """Raises EngineUnavailable where it is no such list."""
    try:
        return msgspec.convert(said, ServedModels).data
    except msgspec.ValidationError as error:
        raise EngineUnavailable("the upstream's /v1/models is no list of models") from error


def base_among(models: list[ServedModel], wanted: str | None) -> ServedModel:
    """Raises ModelNotServable where the upstream does not serve it."""
    found = next((one for one in models if one.id == wanted or (wanted is None and one.parent is None)), None)
    if found is None:
        names = ", ".join(one.id for one in models if one.parent is None)
        raise ModelNotServable(f"upstream.model = {wanted!r}: the upstream serves {names or 'no model'}")
    return found


def described(settings: Settings, base: ServedModel, host: str, embedding_width: int) -> EngineInfo:
    """Raises ModelNotServable where config.json says too little, or the settings ask for more than is served."""
    model = settings.model
    path = model.directory / "config.json"
    positions = stated_positions(model.directory)  # and see that the file can be read
    length = base.max_model_len or positions
    config = json.loads(path.read_text())
    text = {**config, **config.get("text_config", {})}
    if length is None and model.max_model_len is None:
        raise ModelNotServable("the upstream does not tell its max_model_len; set model.max_model_len")
    if length is not None and (model.max_model_len or 0) > length:
        raise ModelNotServable(f"model.max_model_len = {model.max_model_len} exceeds the upstream's {length}")
    if not isinstance(text.get("vocab_size"), int):
        raise ModelNotServable(f"{path} names no vocab_size")
    return EngineInfo(
        engine="upstream",
        base_model=model.name,
        architecture=str((config.get("architectures") or ["unknown"])[0]),
        dtype=str(text.get("dtype") or text.get("torch_dtype") or "unknown"),
        device=host,
        vocab_size=text["vocab_size"],
        max_model_len=model.max_model_len or length or 0,
        num_parameters=0,
        kv_block_size=0,
        num_kv_blocks=0,
        embedding_width=embedding_width,
        sampling_defaults=SamplingDefaults()
        if model.generation_config == "none"
        else sampling_defaults(model.directory),
    )


def eos_token_ids(directory: Path) -> frozenset[int]:
    """The ends of sequence that the checkpoint names: in generation_config.json, else in config.json."""
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if not path.is_file():
            continue
        config = json.loads(path.read_text())
        eos = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
        if eos is not None:
            return frozenset([eos] if isinstance(eos, int) else eos)
    return frozenset()
