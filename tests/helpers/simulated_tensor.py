"""The tensors of the simulated device, and what happens to each operation on them."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Work
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.simulated_module import NAME, DeviceModule, Event, Stream, Transfers

SIM = torch.device("privateuseone", 0)
CPU = torch.device("cpu")
# Their result, or its shape, is a number that the host asks for.
ASKING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "bincount", "repeat_interleave"}
# What autocast computes in the lower precision, as on the CPU.
LOWER = (
    *("conv1d", "conv2d", "conv3d", "conv1d.padding", "conv2d.padding", "conv3d.padding", "conv_transpose1d"),
    *("conv_transpose2d.input", "conv_transpose3d.input", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm"),
)
INDEXING = {"index", "index_put", "index_put_"}
aten: Any = torch.ops.aten
_get_plain_future = Work.get_future
_pinned: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()


class SimulatedTensor(torch.Tensor):
    """A tensor that says it is on the device. `numbers` is the same memory as a tensor of the CPU."""

    numbers: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers: Tensor) -> SimulatedTensor:
        tensor = torch.Tensor._make_subclass(cls, numbers, False, dispatch_device=True, device_for_backend_keys=SIM)
        tensor.numbers, numbers.of_device = numbers, True
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers"], None  # so that `Module.to` keeps a parameter the same object, as it does on other devices

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> SimulatedTensor:
        return SimulatedTensor(inner["numbers"])

    def __deepcopy__(self, memo: dict[int, Any]) -> SimulatedTensor:
        copy = SimulatedTensor(self.numbers.clone()).requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copy._is_param = True  # which makes it a torch.nn.Parameter
        memo[id(self)] = copy
        return copy

    def __repr__(self) -> str:
        Transfers.note("repr")
        return f"SimulatedTensor({self.numbers})"

    def tolist(self) -> Any:
        Transfers.note("tolist")
        return self.numbers.tolist()

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None, device: Any = None, **options: Any) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or SIM, **options)

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {NAME} device type tensor to numpy. Use Tensor.cpu()")


class SimulatedMode(TorchDispatchMode):
    """Sees what has no tensor of the device among its arguments and may make one."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: to be skipped by torch's compiler, torch would import it, for 2 s a process."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Does `func` on the CPU, after it has been looked at where it is about the device."""
    if func is torch.ops.prim.device.default:
        return SIM
    tensors: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        _each(value, lambda leaf: tensors.append(leaf) if isinstance(leaf, Tensor) else None)
    ours = [tensor for tensor in tensors if isinstance(tensor, SimulatedTensor)]
    hosts = [tensor for tensor in tensors if not isinstance(tensor, SimulatedTensor)]
    device = kwargs.get("device")
    stays = _is_sim(device) if device is not None else bool(ours)  # whether new tensors are on the device
    if kwargs.pop("pin_memory", False):
        return pinned(func(*args, **kwargs))
    if not ours and not stays:
        return func(*args, **kwargs)
    if _is_composite(func):  # as it is elsewhere before it comes here, but not in inference mode
        with SimulatedMode():
            return func.decompose(*args, **kwargs)
    if func is aten._to_copy.default and bool(ours) != stays:
        if _is_later(args[0], stays, kwargs.get("non_blocking", False), None if ours else args[0]):
            numbers = func(args[0].numbers, **kwargs)
            return Stream.copy_later(pinned(torch.empty_like(numbers)), numbers)
    elif func is aten.copy_.default and hosts and ours:
        if _is_later(args[1], args[0] is ours[0], len(args) > 2 and args[2], hosts[0]):
            return Stream.copy_later(args[0], args[1].numbers)
    else:
        _check(func, args, hosts)
    if torch.Tag.nondeterministic_seeded in func.tags and DeviceModule.seed != torch.default_generator.initial_seed():
        raise RuntimeError(f"{func} draws from the device's generator, whose seed is {DeviceModule.seed}")
    result = func(*_each(args, _to_cpu), **{name: _each(value, _to_cpu) for name, value in kwargs.items()})
    known = {id(tensor.numbers): tensor for tensor in ours} | {id(tensor): tensor for tensor in hosts}
    return _each(result, lambda leaf: _from_cpu(leaf, known)) if stays else result


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """`value` with `change` made to it, or to each item of a list or tuple, and of those in it."""
    return type(value)(_each(item, change) for item in value) if isinstance(value, (list, tuple)) else change(value)


@functools.cache
def _is_composite(func: Any) -> bool:
    return func._can_decompose()


def _is_sim(device: Any) -> bool:
    return torch.device(device).type == NAME


def _to_cpu(leaf: Any) -> Any:
    if isinstance(leaf, SimulatedTensor):
        return leaf.numbers
    return CPU if isinstance(leaf, torch.device) else leaf


def _from_cpu(leaf: Any, known: dict[int, Tensor]) -> Any:
    """A tensor of the device for a new one of the CPU; for one of the arguments, what the argument was."""
    if not isinstance(leaf, Tensor):
        return leaf
    tensor = known.get(id(leaf))
    if tensor is None:
        return SimulatedTensor(leaf)
    if (tensor.shape, tensor.stride()) != (leaf.shape, leaf.stride()):
        raise NotImplementedError("the shape of a tensor of the simulated device cannot be changed in place")
    return tensor


def _is_later(source: Tensor, to_sim: bool, non_blocking: bool, host: Tensor | None) -> bool:
    """Whether a copy between host and device is one to the host that does not block. One that blocks, either way, is noted.

    `host`: the host's tensor, where there is one already; it must be pinned, or the copy blocks whatever it is told.
    """
    if not source.numel():
        return False
    if not non_blocking or not (host is None or is_pinned(host)):
        Transfers.note(f"copy to {NAME if to_sim else 'the host'}: {str(source.dtype)[6:]} {list(source.shape)}")
        return False
    return not to_sim


def _check(func: Any, args: Any, hosts: list[Tensor]) -> None:
    """Notes what asks the device for a number, and refuses host tensors where a real device would."""
    name = func.overloadpacket.__name__
    if name in ASKING:
        Transfers.note(name)
    if name in INDEXING:
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            Transfers.note("index by a mask")
        copied = [*indices, *(value for value in args[2:3] if not value.ndim)]
        if any(host is tensor for host in hosts for tensor in copied if tensor.numel()):
            Transfers.note("index by a host tensor, or a host's number at an index")
        hosts = [host for host in hosts if not any(host is tensor for tensor in copied)]
    elif torch.Tag.pointwise in func.tags:
        hosts = [host for host in hosts if host.ndim]  # one number is an argument of a kernel
    if hosts:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found at least two, {SIM} and cpu")


def pinned(tensor: Tensor) -> Tensor:
    """`tensor`, in memory that counts as pinned from now on."""
    _pinned.add(tensor.untyped_storage())
    return tensor


def is_pinned(tensor: Tensor, device: Any = None) -> bool:
    return not isinstance(tensor, SimulatedTensor) and tensor.untyped_storage() in _pinned


def pin_memory(tensor: Tensor, device: Any = None) -> Tensor:
    if isinstance(tensor, SimulatedTensor):
        raise RuntimeError(f"cannot pin a tensor of {SIM}: only dense CPU tensors can be pinned")
    return tensor if is_pinned(tensor) else pinned(tensor.clone())


def _copying(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`make`, a function that makes a tensor of Python's numbers: on the host first, and then copied to the device."""

    def made(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        if device is None or not _is_sim(device):
            return make(data, device=device, **options)
        needs_gradient = options.pop("requires_grad", False)
        return make(data, **options).to(SIM).requires_grad_(needs_gradient)

    return made


def _get_future(work: Any) -> Any:
    """The future of a collective, whose value is what was sent: here the CPU's tensors in place of the device's."""

    def on_device(leaf: Any) -> Any:
        return SimulatedTensor(leaf) if hasattr(leaf, "of_device") else leaf

    return _get_plain_future(work).then(lambda done: _each(done.value(), on_device))


def autocast_libraries() -> tuple[torch.library.Library, torch.library.Library]:
    """Autocast for the device, as long as what is returned exists."""
    everything, library = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    key = torch._C.DispatchKey.AutocastPrivateUse1

    def lowering(operation: Any) -> Callable[..., Any]:
        def lowered(leaf: Any) -> Any:
            is_single = isinstance(leaf, Tensor) and leaf.dtype == torch.float32
            return leaf.to(torch.get_autocast_dtype(NAME)) if is_single else leaf

        def call(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return operation(*_each(args, lowered), **{name: lowered(value) for name, value in kwargs.items()})

        return call

    for name in LOWER:
        packet, _, overload = name.partition(".")
        library.impl(name, lowering(getattr(getattr(aten, packet), overload or "default")), "AutocastPrivateUse1")
    return everything, library


def patch_torch() -> None:
    """Gives torch what a device written in Python cannot give it otherwise."""
    global _autocast
    _autocast = autocast_libraries()
    Work.get_future = _get_future
    torch.Tensor.pin_memory, torch.Tensor.is_pinned = pin_memory, is_pinned
    torch.Event, torch.Stream = Event, Stream
    torch.tensor, torch.as_tensor = (_copying(function) for function in (torch.tensor, torch.as_tensor))
    torch.accelerator.synchronize = torch.get_device_module(NAME).synchronize
    torch.accelerator.current_stream = torch.get_device_module(NAME).current_stream
