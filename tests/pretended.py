"""A second device without hardware: tensors of the CPU that say they are on "cuda:0" and refuse to meet others.

    with Pretended() as device:
        x = images().to(device)
        x + torch.zeros(len(x), 1, 1, 1)    # RuntimeError: the zeros are on the CPU

Values are real, so results can be compared with those of the CPU. What is on the device is known by the storage, so
views, `.data` and what autograd saved are there too. Stricter than CUDA in one thing: scalars and indices must be on
the device as well, since each of them is a copy from the host in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._device import _device_constructors

DEVICE = torch.device("cuda", 0)
HOST = torch.device("cpu")

_CONSTRUCTORS = _device_constructors()
_READS = {
    getattr(Tensor, name)
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "__contains__", "nonzero")
} | {torch.nonzero, torch.masked_select, Tensor.masked_select, torch.equal, Tensor.equal, torch.unique, Tensor.unique}
"""What makes the host wait for the device."""

_MIXING = {Tensor.copy_, Tensor.data.__set__, torch._has_compatible_shallow_copy_type}
"""What may meet tensors of both devices."""


class PretendedGenerator(torch.Generator):
    """A generator of the CPU that says where it was made for."""

    def __new__(cls, device: Any = "cpu") -> PretendedGenerator:
        made: PretendedGenerator = super().__new__(cls, "cpu")
        made._place = _place(device)
        return made

    @property
    def device(self) -> torch.device:
        return self._place


class Pretended(TorchFunctionMode):
    """The mode; entering it gives the device.

    Attributes:
        waits: names of the functions so far that would have made the host wait for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._there: dict[int, StorageWeakRef] = {}

    def __enter__(self) -> torch.device:  # type: ignore[override]
        self._generator, torch.Generator = torch.Generator, PretendedGenerator  # type: ignore[misc]
        super().__enter__()
        return DEVICE

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        torch.Generator = self._generator  # type: ignore[misc]

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the device."""
        return tensor.untyped_storage()._cdata in self._there

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return DEVICE if self.holds(args[0]) else func(*args)
        if func == Tensor.is_cuda.__get__:
            return self.holds(args[0])
        if func == Tensor.is_cpu.__get__:
            return not self.holds(args[0])
        if func is Tensor.pin_memory:
            return args[0]
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._moved(func, args, given)
        if func in (Tensor.numpy, Tensor.__array__) and self.holds(args[0]):
            raise TypeError("can't convert a tensor of the pretended device to NumPy; call .cpu() first")
        if func in (torch.as_tensor, torch.tensor, torch.asarray) or func in _CONSTRUCTORS:
            return self._made(func, args, given)
        tensors = list(_tensors((args, given)))
        here, there = ([t for t in tensors if self.holds(t) is on] for on in (False, True))
        device = given.pop("device", None)
        on = bool(there) if device is None else _on(device)
        if func is Tensor.copy_ and here and there:
            self._wait(func)
        if func in _MIXING:
            return func(*args, **given)
        self._drawn(func, given, on)
        if here and there:
            shapes = [tuple(t.shape) for t in here]
            raise RuntimeError(f"{_name(func)} met tensors of the device and tensors of the CPU of shapes {shapes}")
        if there and (func in _READS or _of_booleans(func, args)):
            self._wait(func)
        return self._placed(func(*args, **given), on)

    def _moved(self, func: Callable[..., Any], args: tuple[Any, ...], given: dict[str, Any]) -> Tensor:
        tensor: Tensor = args[0]
        on = was = self.holds(tensor)
        rest = list(args[1:])
        if func is not Tensor.to:
            on, found = func is Tensor.cuda, tensor
        else:
            other = given.pop("other", None)
            if rest and isinstance(rest[0], Tensor):
                other = rest.pop(0)
            if other is not None:
                on, given["dtype"] = self.holds(other), other.dtype
            elif rest and (rest[0] is None or isinstance(rest[0], (torch.device, str, int))):
                on = on if rest[0] is None else _on(rest[0])
                rest[0] = HOST
            elif given.get("device") is not None:
                on, given["device"] = _on(given["device"]), HOST
            found = tensor.to(*rest, **given)
        if on == was:
            return self._placed(found, on)
        if not (on and given.get("non_blocking")):
            self._wait(func)
        return self._placed(found.clone() if found.untyped_storage()._cdata == _storage(tensor) else found, on)

    def _made(self, func: Callable[..., Any], args: tuple[Any, ...], given: dict[str, Any]) -> Tensor:
        device = given.pop("device", None)
        source = args[0] if args and isinstance(args[0], Tensor) else given.get("data")
        source = source if isinstance(source, Tensor) else None
        inherited = source is not None and self.holds(source)
        on = inherited if device is None else _on(device)
        self._drawn(func, given, on)
        filled = func in (torch.as_tensor, torch.tensor, torch.asarray)
        if on != inherited and filled:
            self._wait(func)
        outs = list(_tensors((args[1:], given)))
        if any(self.holds(t) is not on for t in outs):
            raise RuntimeError(f"{_name(func)} met tensors of the device and tensors of the CPU")
        made = func(*args, **given)
        if filled and on:
            made = made if inherited else made.clone()
        elif filled and inherited:
            made = made.clone()
        return self._placed(made, on)

    def _drawn(self, func: Callable[..., Any], given: dict[str, Any], on: bool) -> None:
        generator = given.get("generator")
        if generator is not None and (generator.device.type != "cpu") is not on:
            raise RuntimeError(f"{_name(func)}: the generator is on {generator.device}, the draws are not")

    def _placed(self, value: Any, on: bool) -> Any:
        for tensor in _tensors(value) if on else ():
            storage = tensor.untyped_storage()
            if storage._cdata not in self._there:
                self._there[storage._cdata] = StorageWeakRef(storage)
        return value

    def _wait(self, func: Callable[..., Any]) -> None:
        self.waits.append(_name(func))


def _place(device: Any) -> torch.device:
    return DEVICE if _on(device) else HOST


def _on(device: Any) -> bool:
    return isinstance(device, int) or torch.device(device).type == DEVICE.type


def _name(func: Callable[..., Any]) -> str:
    return str(resolve_name(func) or getattr(func, "__name__", func))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _of_booleans(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether an index of booleans says how many rows come out."""
    if func not in (Tensor.__getitem__, Tensor.__setitem__):
        return False
    # Assigning one number through booleans is a masked fill, without a wait.
    if func is Tensor.__setitem__ and not isinstance(args[2], Tensor):
        return False
    return any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1]))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
