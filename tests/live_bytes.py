"""How many bytes of tensors are alive while something is computed on a CPU, which counts none itself."""

import contextlib
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, for as long as they live; those made before do not count.

    capacity: an operation whose results go beyond it fails as on a GPU. What is made in a C++ kernel and gone when it
    returns is not seen.
    """

    def __init__(self, capacity: float = float("inf")):
        super().__init__()
        self.capacity = capacity
        self.now = self.peak = 0
        self._counting = True
        self._seen: dict[int, tuple[int, weakref.ref]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            self._see(tensor, 0)
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            self._see(tensor, 1)
        return out

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Do not count what is made meanwhile."""
        self._counting = False
        try:
            yield
        finally:
            self._counting = True

    def _see(self, tensor: object, share: int) -> None:
        """Count a tensor's storage unless it is known; share: 0 for one that was there before."""
        if not isinstance(tensor, Tensor) or tensor.device.type != "cpu":
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, share * self._counting * storage.nbytes()
        if key in self._seen:
            return
        if size and self.now + size > self.capacity:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB. GPU 0 has a total capacity of ..."
            )
        self.now += size
        self.peak = max(self.peak, self.now)
        self._seen[key] = size, weakref.ref(storage, lambda _: self._forget(key))

    def _forget(self, key: int) -> None:
        size, _ = self._seen.pop(key, (0, None))
        self.now -= size
