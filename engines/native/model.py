"""A transformers checkpoint -> a model we can step, or ModelNotServable with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loraplex.config.settings import Model
from loraplex.engines.adapters.peft import UNUSED, Base, BaseModule
from loraplex.engines.errors import ModelNotServable
from loraplex.engines.native.attention import ForeignAttention, PagedAttention

_UNITS = 512  # unit vectors at a time
TRIAL_TOKENS = 11  # a size that no other dimension has
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises ModelNotServable where there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelNotServable(f"model.device = {name!r} is none that torch knows") from error
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= found:
        raise ModelNotServable(f"model.device = {name!r}: torch {torch.__version__} finds {found} CUDA devices here")
    return device


def use_device(device: torch.device) -> None:
    """Make it the calling thread's, where Triton launches and torch allocates what names no device."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def load_model(settings: Model, device: torch.device, attention: PagedAttention) -> PreTrainedModel:
    """Build the model on `device` with our attention in every layer. Raises ModelNotServable."""
    path = settings.directory
    if not (path / "config.json").is_file():
        raise ModelNotServable(f"model.path = {settings.path!r} holds no config.json")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        if getattr(config.get_text_config(), "prefix_lm", False):
            raise ModelNotServable(
                f"{config.model_type} is not served: its prompts are read in both directions (prefix_lm), and this "
                'engine reads every token in one; "prefix_lm": false in config.json has it served so'
            )
        try:
            model = _read_weights(settings, config, attention.name)
        except KeyError as error:
            if error.args != (attention.name,):
                raise
            attention.intercepts = True
            model = _read_weights_with_torchs_attention(settings, config)
    except KeyError as error:
        raise ModelNotServable(f"{settings.path}: {error!r}") from error
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ModelNotServable(f"{settings.path}: {error}") from error
    module: nn.Module = model  # transformers leaves these methods untyped
    module.eval().requires_grad_(False).to(device)
    return model


def _read_weights(settings: Model, config: PretrainedConfig, attention: str) -> PreTrainedModel:
    """Or make them up, as transformers initialises them, where that is asked for."""
    model: PreTrainedModel
    if settings.random_weights:
        dtype = DTYPES.get(settings.dtype) or config.dtype or torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)  # type: ignore[no-untyped-call]
        return model
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        settings.directory,
        config=config,
        dtype=DTYPES.get(settings.dtype, "auto"),
        attn_implementation=attention,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    model, report = loaded
    _require_all_weights(report["missing_keys"], report["mismatched_keys"])
    return model


def _require_all_weights(missing: Set[str], mismatched: Set[tuple[str, Sequence[int], Sequence[int]]]) -> None:
    """Raises ModelNotServable where transformers made weights up: it only warns of that."""
    if mismatched:
        name, found, wanted = min(mismatched)
        raise ModelNotServable(
            f"{len(mismatched)} of the checkpoint's tensors have another shape than the model's; the first is {name}, "
            f"{list(found)} instead of {list(wanted)}"
        )
    if missing:
        raise ModelNotServable(
            f"the checkpoint lacks {len(missing)} of the model's tensors; the first is {min(missing)}"
        )


def _read_weights_with_torchs_attention(settings: Model, config: PretrainedConfig) -> PreTrainedModel:
    try:
        return _read_weights(settings, config, "sdpa")
    except ValueError as error:
        raise ModelNotServable(
            f"{config.model_type} is not served: in transformers its layers do not use its attention interface"
        ) from error


@dataclass(frozen=True, slots=True)
class Passage:
    """How tokens pass a module: the dimension they lie along in each tensor it is given and gives, by place or name.

    `selected`: it sees only the tokens that logits are wanted of.
    """

    inputs: dict[int | str, int]
    outputs: dict[int, int]
    selected: bool


@dataclass(frozen=True, slots=True)
class Trial:
    """What a dry run showed: whether the model picks the tokens to give logits for, and the layers by name.

    `layers` are those a LoRA may stand beside, in the model's order; `unfit` says why another linear layer is none.
    `passages` are those of the modules with parameters of their own. `stateful` are the layers without attention.
    `decoder` gives the final hidden states, `embedding_width` numbers a token; None and 0 where there is none.
    """

    selects: bool
    layers: dict[str, tuple[nn.Module, BaseModule]]
    unfit: dict[str, str]
    passages: dict[str, Passage]
    stateful: tuple[int, ...]
    decoder: nn.Module | None
    embedding_width: int


def dry_run(model: PreTrainedModel, attention: PagedAttention) -> Trial:
    """Run a few tokens to learn what each module sees. Raises ModelNotServable where the model cannot be carried."""
    ids = ordinary_token_ids(model)[None, :TRIAL_TOKENS].to(model.device)
    positions = torch.arange(ids.shape[1], device=model.device)[None]
    linear = linear_layers(model)
    owners = {name: module for name, module in model.named_modules() if [*module.parameters(recurse=False)]} | linear
    passages: dict[str, Passage | None] = {}
    decoder, hidden = _decoder(model), [0]
    hooks = [module.register_forward_hook(_note(passages, name, ids.shape[1]), with_kwargs=True)
             for name, module in owners.items()]  # fmt: skip
    given: dict[str, Tensor] = {}
    types: dict[str, set[torch.dtype]] = {}
    hooks += [layer.register_forward_hook(_keep_input(given, types, name)) for name, layer in linear.items()]
    if decoder is not None:
        hooks.append(decoder.register_forward_hook(lambda *call: hidden.append(_hidden_width(call[-1], ids.shape[1]))))
    try:
        with torch.inference_mode(), attention.intercepting():
            logits = model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1).logits
    except Exception as error:  # any failure of foreign model code means the same: it cannot be carried
        raise ModelNotServable(f"{type(model).__name__} {_obstacle(model, error)}") from error
    finally:
        attention.end_notes()
        for hook in hooks:
            hook.remove()
    if not attention.layers or attention.own_masks:
        reason = "make attention masks of their own" if attention.layers else "do not use its attention interface"
        raise ModelNotServable(f"{type(model).__name__} is not served: in transformers its layers {reason}")
    passable = {name for name in linear if _is_linear_passage(passages.get(name))}
    fit = [name for name in linear if name in passable and types[name] == {model.dtype}]
    kinds = {id(tensor): number for number, tensor in enumerate(given.values())}
    inputs = {name: kinds[id(tensor)] for name, tensor in given.items()}
    num_layers = model.config.get_text_config().num_hidden_layers
    return Trial(
        selects=logits.shape[1] == 1,
        layers={name: (linear[name], BaseModule(index, name, *_features(linear[name]), inputs[name]))
                for index, name in enumerate(fit)},
        unfit={name: _of_other_types(types[name], model.dtype) if name in passable
               else "does not turn each token's row into one" if _is_used(name, passages) else UNUSED
               for name in owners if name not in fit and (name in linear or passages.get(name) is None)},
        passages={name: passage for name, passage in passages.items()
                  if passage is not None and not _has_linear_inside(owners[name])},
        stateful=tuple(sorted(set(range(num_layers)) - set(attention.layers))),
        decoder=decoder if hidden[-1] else None,
        embedding_width=hidden[-1],
    )  # fmt: skip


def _is_used(name: str, called: Iterable[str]) -> bool:
    """Also a module that is asked for its parts instead of being called."""
    return any(other == name or other.startswith(f"{name}.") for other in called)


def _obstacle(model: PreTrainedModel, error: Exception) -> str:
    if getattr(model.config.get_text_config(), "index_topk", None):
        return "is not served: its layers choose anew for each token which others it attends to (index_topk)"
    if isinstance(error, ForeignAttention):
        return f"is not served: {error}"
    if others := _weights_of_other_types(model):
        return f"cannot be stepped in {_name(model.dtype)}: quantised weights are computed in {others}; set model.dtype"
    return f"cannot be stepped: {error!r}"


def _weights_of_other_types(model: PreTrainedModel) -> str:
    """The types that a quantised model's layers have become, where they are not the model's."""
    if getattr(model, "hf_quantizer", None) is None:
        return ""
    weights = [getattr(layer, "weight", None) for layer in linear_layers(model).values()]
    kinds = {weight.dtype for weight in weights if isinstance(weight, Tensor)}
    wide = {kind for kind in kinds if kind.is_floating_point and kind.itemsize > 1}
    return ", ".join(sorted(_name(kind) for kind in wide - {model.dtype}))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _decoder(model: PreTrainedModel) -> nn.Module | None:
    """What makes the hidden states that the head makes logits of: `AutoModel`, where it is another model."""
    decoder: nn.Module = model.base_model
    return decoder if decoder is not model else None


def _hidden_width(output: Any, num_tokens: int) -> int:
    """Of one row for each token as a model's first output; 0 where it is something else."""
    hidden = output[0] if not isinstance(output, Tensor) else output
    is_hidden = isinstance(hidden, Tensor) and hidden.dim() == 3 and hidden.shape[:2] == (1, num_tokens)
    return int(hidden.shape[2]) if is_hidden else 0


def _of_other_types(types: Set[torch.dtype], adapters: torch.dtype) -> str:
    """Why a layer that is given or gives these carries no LoRA: kernels read adapters as what they are given."""
    others = ", ".join(sorted(_name(dtype) for dtype in types - {adapters}))
    return f"is computed in {others}, adapters in {_name(adapters)}"


def _keep_input(given: dict[str, Tensor], types: dict[str, set[torch.dtype]], name: str) -> Callable[..., None]:
    """A hook that keeps what a linear layer was given, and the types of that and of what it gave."""

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        given[name] = inputs[0]
        types.setdefault(name, set()).update(one.dtype for one in (inputs[0], output) if isinstance(one, Tensor))

    return keep


def _note(passages: dict[str, Passage | None], name: str, num_tokens: int) -> Callable[..., None]:
    """A hook that notes a module's passage; None where it is called in different ways or not by tokens."""

    def note(module: nn.Module, inputs: tuple[object, ...], named: dict[str, object], output: object) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        given: dict[int | str, object] = dict(enumerate(inputs))
        given.update(named.items())
        found = _passage(given, outputs, num_tokens)
        passages[name] = found if passages.get(name, found) == found else None

    return note


def _passage(given: dict[int | str, object], outputs: tuple[object, ...], num_tokens: int) -> Passage | None:
    for size, selected in ((num_tokens, False), (1, True)):
        into = {place: dim for place, value in given.items() if (dim := _token_dim(value, size)) is not None}
        out = {place: dim for place, value in enumerate(outputs) if (dim := _token_dim(value, size)) is not None}
        if into and len(out) == len(outputs):
            return Passage(into, out, selected)
    return None


def _token_dim(value: object, size: int) -> int | None:
    """The one dimension of that size; of size one, for tokens selected, the one before the last."""
    if not isinstance(value, Tensor):
        return None
    dims = [dim for dim, length in enumerate(value.shape) if length == size]
    if size == 1:
        return value.dim() - 2 if value.dim() in (2, 3) and value.shape[-2] == 1 else None
    return dims[0] if len(dims) == 1 else None


def _is_linear_passage(passage: Passage | None) -> bool:
    """Whether rows of tokens go in and one tensor of rows comes out."""
    return passage is not None and len(passage.outputs) == 1 and 0 in passage.inputs


def _has_linear_inside(module: nn.Module) -> bool:
    return any(_is_linear(inner) for inner in module.modules() if inner is not module)


def refuse_long_context(model: PreTrainedModel, attention: PagedAttention, max_len: int) -> None:
    """Raises ModelNotServable where tokens far apart would be treated otherwise than the checkpoint says."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or []
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None and "chunked_attention" in kinds and max_len > chunk:
        raise ModelNotServable(f"attention in chunks of {chunk} tokens is not served; set model.max_model_len to that")
    window = getattr(config, "sliding_window", None)
    slides = {layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"}
    told = {layer for layer, width in zip(attention.layers, attention.windows, strict=True) if width is not None}
    if window is not None and max_len > window and not slides <= told:
        raise ModelNotServable(
            f"layers {sorted(slides - told)} attend in a window that they do not tell the attention function; set "
            f"model.max_model_len to at most {window}"
        )


def ordinary_token_ids(model: PreTrainedModel) -> Tensor:
    """Token ids without a special meaning, all over the vocabulary and each once. Shape [at most 64]."""
    config = model.config.get_text_config()
    special = {value for name, value in model.config.to_dict().items() if name.endswith("token_id")
               and isinstance(value, int)}  # fmt: skip
    vocabulary = range(4, int(config.vocab_size), max(1, int(config.vocab_size) // 64))
    return torch.tensor([token for token in vocabulary if token not in special][:64])


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every linear layer by name, in the model's order."""
    return {name: layer for name, layer in model.named_modules() if _is_linear(layer)}


def _is_linear(layer: nn.Module) -> bool:
    """Also the quantised ones that do not derive from torch's: they all say how wide they are."""
    sizes = (getattr(layer, "in_features", None), getattr(layer, "out_features", None))
    return isinstance(layer, Conv1D) or all(isinstance(size, int) for size in sizes)


def _features(layer: nn.Module) -> tuple[int, int]:
    """(in, out)."""
    if isinstance(layer, Conv1D):
        return int(layer.weight.shape[0]), int(layer.weight.shape[1])
    assert isinstance(layer.in_features, int)
    assert isinstance(layer.out_features, int)
    return layer.in_features, layer.out_features


def dense_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """A layer's weight as [out, in]. A quantised one is what the layer makes of each unit vector of `dtype`."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and type(weight.data) is Tensor and weight.is_floating_point() and weight.dim() == 2:
        return weight.t() if isinstance(layer, Conv1D) else weight
    width, bias = _features(layer)[0], getattr(layer, "bias", None)
    forward: Callable[..., Tensor] = type(layer).forward  # beneath the LoRA, whose step knows all tokens
    device = next(tensor.device for tensor in [*layer.parameters(), *layer.buffers()])
    columns = []
    for first in range(0, width, _UNITS):
        units = torch.zeros(min(_UNITS, width - first), width, dtype=dtype, device=device)
        units[:, first:].fill_diagonal_(1.0)
        with torch.inference_mode():
            y = forward(layer, units)
        columns.append((y if bias is None else y - bias).t())
    return torch.cat(columns, dim=1)


def base_of(model: PreTrainedModel, trial: Trial, max_rank: int) -> Base:
    """What adapters are checked against."""
    layers = [layer for layer, _ in trial.layers.values()]
    own = {name: model.get_submodule(name) for name in trial.passages}
    tensors = {
        f"{name}.{key}": tensor
        for name, module in own.items()
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if tensor.is_floating_point() and key not in module._non_persistent_buffers_set
    }
    embeddings = {name: module for name, module in own.items() if isinstance(module, nn.Embedding)}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[no-untyped-call]
    is_tied = head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", 0)
    return Base(
        modules={name: module for name, (_, module) in trial.layers.items()},
        weight=lambda index: dense_weight(layers[index], model.dtype),
        dtype=model.dtype,
        max_rank=max_rank,
        unfit=trial.unfit,
        parameters={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        parameter=lambda name: tensors[name],
        embeddings={name: tuple(module.weight.shape) for name, module in embeddings.items()},
        input_embedding=next((name for name, module in embeddings.items() if module is embedding), ""),
        tied_head=next((name for name, module in own.items() if module is head), None) if is_tied else None,
        transposed=frozenset(name for name in tensors if getattr(own[name.rpartition(".")[0]], "is_transposed", False)),
        pins_memory=model.device.type == "cuda",
    )
