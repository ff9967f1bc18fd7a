"""A forward pass written down once and made again without the model's Python, as CUDA's graphs are.

While it is captured, each operation of torch and each kernel that is called is noted, with the memory that it reads and
writes. A replay makes the same calls over the same memory; what differs from pass to pass lies in tensors that were
there before and keep their place. What cannot be repeated so is refused by name: numbers that Python looked at, shapes
that depend on values, chance.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from loraplex.kernels.built import Argument, Kernel, listening
from loraplex.kernels.calls import Calls
from loraplex.kernels.fused.cpu_elementwise import Call, add, multiply, pick_rows
from loraplex.kernels.fused.cpu_elementwise import is_available as are_built

_ALIGNMENT = 64  # bytes, as torch's own memory has
_UNREPEATABLE = {torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}
_aten = torch.ops.aten
_ALLOCATIONS = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}
_REPLACEMENTS = {_aten.set_, _aten.resize_, _aten.resize_as_}  # of the memory of a tensor


class NotCapturable(Exception):
    """A pass cannot be repeated without its Python."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies: from `offset` elements on in memory that was made while capturing."""

    memory: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(slots=True)
class _Use:
    """The numbers of the first and the last entry that have to do with some memory."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class _Operation:
    """`outputs` are those that it makes anew, none where it writes to what was there."""

    function: Any
    args: Any
    kwargs: Any
    outputs: Any

    def found(self, find: Callable[[Any], Any]) -> _Operation:
        """The same with tensors where places were."""
        return _Operation(self.function, *(_mapped(find, part) for part in (self.args, self.kwargs, self.outputs)))


@dataclass(frozen=True, slots=True)
class _KernelCall:
    kernel: Kernel
    arguments: tuple[Any, ...]

    def found(self, address: Callable[[Any], Any]) -> Call:
        """The call with addresses where places were."""
        return self.kernel, tuple(map(address, self.arguments))


@contextmanager
def _noticing_readings(on_reading: Callable[[str], None]) -> Iterator[None]:
    """Within it each way is noticed in which this thread reads a tensor's memory past all operations.

    torch has a mode for that, which is told of every property as well and makes a capture a third slower.
    """
    own, this_thread = vars(Tensor), threading.get_ident()
    originals = {name: (name in own, getattr(Tensor, name)) for name in ("tolist", "numpy", "__array__")}

    def noticing(name: str, original: Any) -> Any:
        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == this_thread:
                on_reading(f"Tensor.{name}")
            return original(tensor, *args, **kwargs)

        return read

    for name, (_, original) in originals.items():
        setattr(Tensor, name, noticing(name, original))
    try:
        yield
    finally:
        for name, (was_own, original) in originals.items():
            if was_own:
                setattr(Tensor, name, original)
            else:
                delattr(Tensor, name)


class Pool:
    """Memory that graphs share, of which one is replayed at a time."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        """At least so many bytes, of which earlier graphs may have had some. Shape [N], uint8."""
        if num_bytes > len(self._bytes):
            self._bytes = torch.empty(num_bytes, dtype=torch.uint8)
        return self._bytes


class Graph:
    """A pass that was captured. Its result lies in the pool: it is gone with the next replay of any graph there."""

    def __init__(self, steps: Sequence[Callable[[], object]], result: Tensor, memory: Tensor) -> None:
        self._steps = steps
        self._memory = memory  # which the steps know by its address
        self.result = result

    def replay(self) -> Tensor:
        """Compute it again from what its inputs hold now. Result: of the shape and type that the captured pass gave."""
        for step in self._steps:
            step()
        return self.result


class Capture(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What is computed while it is `capturing`, on a CPU; then `graph` tells what is to be repeated."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._entries: list[_Operation | _KernelCall] = []
        self._made: dict[int, int] = {}  # address of memory that was made within -> bytes
        self._used: dict[int, _Use] = {}  # the same -> by which entries
        self._kept: list[Any] = []  # so that no address is given twice
        self._refusal: str | None = None

    @contextmanager
    def capturing(self) -> Iterator[None]:
        with listening(self._note_kernel), _noticing_readings(self._note_reading), self:
            yield

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Of torch's: nothing is compiled within, and keeping compilers off takes longer than an operation."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _stands_for_several(func):
            with self:  # their own are what is noted
                return func.decompose(*args, **kwargs)
        output = func(*args, **kwargs)
        if _is_view(func):
            return output
        if _is_allocation(func) and _is_plain(output):
            self._kept.append(output)
            self._note_memory(output)
            return output
        self._kept.append((args, kwargs, output))
        self._refusal = self._refusal or self._note(func, args, kwargs, [*_leaves(output)])
        return output

    def graph(self, result: Tensor, pool: Pool) -> Graph:
        """Of the pass that ended with this result. Raises NotCapturable naming what stands against it."""
        if self._refusal is not None:
            raise NotCapturable(self._refusal)
        last = self._place(result)  # which is used after all entries
        memory = _laid_out(self._made, self._used)
        taken = pool.take(max((offset + _rounded(self._made[key]) for key, offset in memory.items()), default=0))
        find, address = (partial(found, memory=memory, pool=taken) for found in (_found, _found_address))
        steps: list[Callable[[], object]] = []
        calls: list[Call] = []  # that follow one another
        for entry in self._entries:
            if isinstance(entry, _KernelCall):
                calls.append(entry.found(address))
                continue
            found = entry.found(find)
            call = _in_c(found)
            if call is not None:
                calls.append(call)
                continue
            if calls:
                steps.append(Calls(calls))
                calls = []
            steps.append(_repeated(found))
        return Graph([*steps, Calls(calls)] if calls else steps, find(last), taken)

    def _note(self, func: Any, args: Any, kwargs: Any, outputs: list[Any]) -> str | None:
        """Result: why it cannot be repeated."""
        packet = getattr(func, "overloadpacket", None)
        if packet is None or packet in _REPLACEMENTS:
            return f"{func} is not known to be repeatable"
        if not all(_is_plain(output) for output in outputs):
            return f"{func} gives something else than plain tensors"
        if torch.Tag.inplace_view in func.tags:
            return None  # of the tensor as Python sees it; nothing is computed
        known = {_address(value) for value in _leaves((args, kwargs)) if isinstance(value, Tensor)}
        fresh = [output for output in outputs if output.numel() and _address(output) not in known]
        if not func._schema.is_mutable and not fresh:
            return None  # views
        if not _UNREPEATABLE.isdisjoint(func.tags) and not _is_certain(func, args):
            return f"{func} gives what depends on values, or on chance"
        if fresh and (func._schema.is_mutable or len(fresh) < len(outputs)):
            return f"{func} makes new tensors beside old ones"
        for output in fresh:
            self._note_memory(output)
        placed = [_mapped(self._place, part) for part in (args, kwargs, fresh)]
        self._entries.append(_Operation(func, *placed))
        return None

    def _note_memory(self, output: Tensor) -> None:
        if output.numel():
            self._made[_address(output)] = output.untyped_storage().nbytes()

    def _note_reading(self, name: str) -> None:
        self._refusal = self._refusal or f"{name} gives numbers to Python"

    def _note_kernel(self, kernel: Kernel, arguments: tuple[Argument, ...]) -> None:
        self._kept.append(arguments)
        self._entries.append(_KernelCall(kernel, tuple(map(self._place, arguments))))

    def _place(self, value: Any) -> Any:
        """Of a tensor that was made within, which the entry that comes next uses; anything else is itself."""
        if not _is_plain(value) or (memory := _address(value)) not in self._made:
            return value
        number = len(self._entries)
        self._used.setdefault(memory, _Use(number, number)).last = number
        return _Place(memory, value.dtype, tuple(value.shape), value.stride(), value.storage_offset())


@cache
def _stands_for_several(function: Any) -> bool:
    """Whether an operation has no kernel of its own but is made of others."""
    return isinstance(function, OpOverload) and function._can_decompose()


@cache
def _is_view(function: Any) -> bool:
    """Whether an operation computes nothing: what it gives is what it takes, seen otherwise."""
    return isinstance(function, OpOverload) and function.is_view


@cache
def _is_allocation(function: Any) -> bool:
    """Whether an operation gives memory of which nothing is known yet."""
    return isinstance(function, OpOverload) and function.overloadpacket in _ALLOCATIONS


def _leaves(value: Any) -> Iterator[Any]:
    """What an operation takes or gives, out of its lists and tuples."""
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, dict):
        yield from _leaves([*value.values()])
    else:
        yield value


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """The same with each of the leaves changed."""
    if isinstance(value, (list, tuple)):
        return type(value)([_mapped(change, part) for part in value])
    return {key: _mapped(change, part) for key, part in value.items()} if isinstance(value, dict) else change(value)


def _is_certain(function: Any, args: Sequence[Any]) -> bool:
    """What can depend on values or chance and does not: indexing by numbers, and attention whose dropout is off."""
    if function.overloadpacket is _aten.index:
        return not any(index.dtype == torch.bool for index in args[1] if index is not None)
    names = [argument.name for argument in function._schema.arguments]
    return "dropout_p" in names and (len(args) <= (place := names.index("dropout_p")) or not args[place])


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor that is nothing but its memory."""
    return type(value) in (Tensor, nn.Parameter)


def _address(tensor: Tensor) -> int:
    """Of its memory, which other tensors may share."""
    return tensor.untyped_storage().data_ptr() if _is_plain(tensor) else 0


def _laid_out(sizes: dict[int, int], used: dict[int, _Use]) -> dict[int, int]:
    """The first byte in the pool of each memory that is used: what is not used any more makes room for others."""
    offsets: dict[int, int] = {}
    taken: list[tuple[int, int, int]] = []  # (first byte, end, last entry) of what is in use, in that order
    for memory, use in used.items():  # in the order in which they are used first
        taken = [room for room in taken if room[2] >= use.first]
        size, begin, place = _rounded(sizes[memory]), 0, 0
        for place, (start, end, _) in enumerate([*taken, (2**62, 0, 0)]):  # noqa: B007
            if begin + size <= start:
                break
            begin = end
        taken.insert(place, (begin, begin + size, use.last))
        offsets[memory] = begin
    return offsets


def _rounded(num_bytes: int) -> int:
    """Up to what memory is aligned to."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _found(value: Any, memory: dict[int, int], pool: Tensor) -> Any:
    """The tensor that lies in the pool at a place; anything else is itself."""
    if not isinstance(value, _Place):
        return value
    whole = pool[memory[value.memory] :].view(value.dtype)
    return whole.as_strided(value.size, value.stride, whole.storage_offset() + value.offset)


def _found_address(value: Any, memory: dict[int, int], pool: Tensor) -> Any:
    """Where in the pool, which has to be kept, a place is; anything else is itself."""
    if not isinstance(value, _Place):
        return value
    return pool.data_ptr() + memory[value.memory] + value.offset * value.dtype.itemsize


def _in_c(operation: _Operation) -> Call | None:
    """The kernel that does the same to the last bit, where there is one: torch takes longer to begin than to end."""
    packet, args, kwargs = operation.function.overloadpacket, operation.args, operation.kwargs
    if not are_built() or len(operation.outputs) != 1 or not all(_is_plain(v) for v in args[:1]):
        return None
    [y] = operation.outputs
    if packet in (_aten.add, _aten.mul) and len(args) == 2 and _is_plain(args[1]) and not kwargs:
        return (add if packet is _aten.add else multiply)(args[0], args[1], y)
    if packet is _aten.embedding:
        return pick_rows(args[0], args[1], y)
    if packet is _aten.index and args[0].shape[0] == 1 and len(args[1]) == 2 and args[1][0] is None:
        return pick_rows(args[0][0], args[1][1], y[0])
    return None


def _repeated(operation: _Operation) -> Callable[[], object]:
    if not operation.outputs:
        return partial(operation.function, *operation.args, **operation.kwargs)
    if operation.function is _aten._to_copy.default:
        return partial(operation.outputs[0].copy_, operation.args[0])
    writing = _writing(operation.function)
    if writing is not None and len(operation.outputs) == 1:
        return partial(writing, *operation.args, **operation.kwargs, out=operation.outputs[0])

    def compute_and_copy() -> None:
        made = _leaves(operation.function(*operation.args, **operation.kwargs))
        for output, value in zip(operation.outputs, made, strict=True):
            output.copy_(value)

    return compute_and_copy


def _writing(function: Any) -> Any | None:
    """The form of an operation that writes its result where it is told to; None where there is none."""
    wanted = [argument.name for argument in function._schema.arguments]
    for name in (f"{function._overloadname}_out", "out"):
        found = getattr(function.overloadpacket, name, None)
        if found is not None and [a.name for a in found._schema.arguments if not a.is_out] == wanted:
            return found
    return None
