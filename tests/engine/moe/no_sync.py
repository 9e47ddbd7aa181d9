"""Modes that refuse what makes the host wait for a GPU, on fake tensors of a GPU that is not there.

`FakeTensorMode` itself refuses sizes and numbers that come from values.
"""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_WAITS = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.bincount,
    torch.ops.aten.equal,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten.nonzero,
    torch.ops.aten.unique_dim,
    torch.ops.aten._unique2,
}
_ASKS = {getattr(Tensor, name) for name in ("__int__", "__bool__", "__float__", "item", "tolist")}


class RefusesToWait(TorchDispatchMode):
    """Counts operations on a GPU, and refuses those that wait for it, or copy from and to it."""

    def __init__(self):
        super().__init__()
        self.num_operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, func.overloadpacket
        found = func(*args, **kwargs)
        tensors = [
            each
            for of in (args, kwargs.values(), found if isinstance(found, tuple) else [found])
            for each in of
            if isinstance(each, Tensor)
        ]
        devices = {each.device.type for each in tensors if each.dim()}
        self.num_operations += "cuda" in devices
        assert packet not in _WAITS, f"the host waits for {func}"
        assert not (len(devices) > 1 and "copy" in str(packet)), f"{func} between {devices}"
        if packet is torch.ops.aten.index:
            masks = [each for each in args[1] if each is not None and each.dtype is torch.bool]
            assert not masks, "sized by a mask"
        if packet is torch.ops.aten.repeat_interleave:
            assert kwargs.get("output_size") is not None, "sized by values"
        return found


class Unguarded(TorchFunctionMode):
    """Takes and copies tensors without a guard of the device, which a torch without CUDA lacks."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in _ASKS, f"the host waits for {func}"
        if func is Tensor.__getitem__:
            return _part(*args)
        if func is Tensor.__setitem__:
            x, key, value = args
            if isinstance(key, Tensor):
                return torch.ops.aten.index_put_(x, [key], value)
            return torch.ops.aten.copy_(_part(x, key), value)
        if func is Tensor.copy_:
            return torch.ops.aten.copy_(*args, **(kwargs or {}))
        if func is Tensor.cpu:
            return torch.ops.aten._to_copy(args[0], device=torch.device("cpu"))
        if func is Tensor.to and isinstance(args[1], torch.device) and args[1] != args[0].device:
            return torch.ops.aten._to_copy(args[0], device=args[1])
        return func(*args, **(kwargs or {}))


def _part(x: Tensor, key) -> Tensor:
    dim, indices = 0, []
    for each in key if isinstance(key, tuple) else (key,):
        if each is None:
            x = torch.ops.aten.unsqueeze(x, dim)
        elif isinstance(each, slice):
            assert each.step is None
            stop = x.shape[dim] if each.stop is None else each.stop
            x = torch.ops.aten.slice(x, dim, each.start or 0, stop)
        elif isinstance(each, int):
            x, dim = torch.ops.aten.select(x, dim, each), dim - 1
        else:
            indices += [None] * (dim - len(indices)) + [each]
        dim += 1
    return torch.ops.aten.index(x, indices) if indices else x
