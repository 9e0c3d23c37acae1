"""What waits for the backward pass: results of cheap functions are computed again from what is there anyway."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

Pack = Callable[[Tensor], Any]  # a tensor > itself, or something that has a method tensor(); None: others decide

_around: ContextVar[Pack] = ContextVar("around", default=Tensor.detach)
_keep: ContextVar[Callable[[], AbstractContextManager] | None] = ContextVar("keep", default=None)
_recipes: ContextVar[Recipes | None] = ContextVar("recipes", default=None)


@contextmanager
def saving(pack: Pack) -> Iterator[None]:
    """Let `pack` say what stands for each tensor that autograd saves, or None: then the saving() around it decides.

    torch's own hooks know nothing of those around them. What nobody claims is kept without its history, with which it
    would keep itself alive if the backward pass never came.
    """
    deciding = [pack, _around.get()]

    def packed(tensor: Tensor) -> Any:
        pack, around = deciding
        saved = pack(tensor)
        return around(tensor) if saved is None else saved

    token = _around.set(packed)
    try:
        with saved_tensors_hooks(packed, restored):
            yield
    finally:
        _around.reset(token)
        deciding.clear()  # the hooks live on in every tensor that was saved, with all that they know


def restored(saved: Any) -> Tensor:
    """Return the tensor that something stands for."""
    return saved if isinstance(saved, Tensor) else saved.tensor()


def recomputed(function: Callable[..., Tensor], layer: bool = False) -> Callable[..., Tensor]:
    """Make a cheap function one whose results, inside recomputing(), are not kept for gradients.

    Whoever needs them, or what the function saves itself, has them computed once more from its arguments: all tensors
    that it uses, weights too. Under torch.compile, which decides this itself, nothing changes.
    layer: it is a layer and its input that it is given, less cheap, and with weights and random numbers of its own;
    only inside recomputing(layers=True).
    """

    @functools.wraps(function)
    def run(*args: Any) -> Tensor:
        if torch.compiler.is_compiling() or (recipes := _recipes.get()) is None or not torch.is_grad_enabled():
            return function(*args)
        if layer and not recipes.layers:
            return function(*args)
        return recipes.run(function, args, args[0] if layer else None)

    return run


def kept(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make a dear function one whose result, inside keeping(), outlives a first run for a second one."""

    @functools.wraps(function)
    def run(*args: Any) -> Tensor:
        if torch.compiler.is_compiling() or (enter := _keep.get()) is None:
            return function(*args)
        with enter():
            return function(*args)

    return run


@contextmanager
def keeping(enter: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Enter what `enter` returns around each call of a kept() function."""
    token = _keep.set(enter)
    try:
        yield
    finally:
        _keep.reset(token)


@contextmanager
def recomputing(layers: bool = False) -> Iterator[None]:
    """Have what recomputed() functions return in here computed again in the backward pass; layers: these too.

    What is needed by others out there, the result of a block, is kept.
    """
    recipes = Recipes(layers)
    token = _recipes.set(recipes)
    try:
        with saving(recipes.pack):
            yield
    finally:
        _recipes.reset(token)


class Recipes:
    """How to compute tensors again, found by their memory, of which there may be many views."""

    def __init__(self, layers: bool):
        self.layers = layers
        # The weak reference keeps the storage's number from being given to another one, not its memory.
        self._by_storage: dict[int, tuple[StorageWeakRef, Recipe]] = {}

    def run(self, function: Callable[..., Tensor], args: Sequence[Any], layer: nn.Module | None) -> Tensor:
        recipe = Recipe(function, args, layer)
        with saving(recipe.pack):
            result = function(*args)
        if _storage(result) not in recipe.given:
            self._by_storage[_storage(result)] = StorageWeakRef(result.untyped_storage()), recipe
        return result

    def pack(self, tensor: Tensor) -> View | None:
        found = self._by_storage.get(_storage(tensor))
        return None if found is None else found[1].view(tensor)


class Recipe:
    """A function and its arguments, each itself or what stands for it: enough to compute its result again."""

    def __init__(self, function: Callable[..., Tensor], args: Sequence[Any], layer: nn.Module | None):
        self.function = function
        self.args = args
        self._pack: Pack | None = _around.get()
        self.given = {_storage(arg) for arg in args if isinstance(arg, Tensor)}
        self.weights = list(layer.parameters()) if layer else []
        self.random = RandomState(args[-1].device) if layer else None
        self.inner = 0  # tensors that autograd saves inside the function
        self.waiting = 0  # times that anything will be asked for
        self._computed: tuple[Tensor, list[Tensor]] | None = None

    def pack(self, tensor: Tensor) -> Inner | None:
        """Return what stands for a tensor that is saved inside the function; None for what is there anyway."""
        if not self._is_inner(tensor, self.given):
            return None
        self._needed()
        self.inner += 1
        return Inner(self, self.inner - 1)

    def view(self, tensor: Tensor) -> View:
        """Return what stands for a view of the result."""
        self._needed()
        return View(self, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())

    def _needed(self) -> None:
        """Let what stands for the arguments wait for the backward pass, not before it is known that it has to."""
        self.waiting += 1
        if self._pack:
            pack, self._pack = self._pack, None
            self.weights = [pack(weight) for weight in self.weights]
            self.args = [
                Argument(pack(arg), arg.requires_grad) if isinstance(arg, Tensor) else arg for arg in self.args
            ]

    def computed(self) -> tuple[Tensor, list[Tensor]]:
        """Return the result and what is saved inside the function; they are held as long as someone waits for them."""
        self.waiting -= 1
        computed = self._computed or self._compute()
        self._computed = computed if self.waiting > 0 else None
        return computed

    def _compute(self) -> tuple[Tensor, list[Tensor]]:
        for weight in self.weights:
            restored(weight)  # for block swap to have a layer's weights in their place
        args = [arg.tensor() if isinstance(arg, Argument) else arg for arg in self.args]
        given = {_storage(arg) for arg in args if isinstance(arg, Tensor)}
        inner: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            if self._is_inner(tensor, given):
                inner.append(tensor.detach())
            return tensor.detach()

        random = self.random.restored() if self.random else nullcontext()
        with random, torch.set_grad_enabled(self.inner > 0), saved_tensors_hooks(pack, restored):
            return self.function(*args).detach(), inner

    def _is_inner(self, tensor: Tensor, given: set[int]) -> bool:
        """Return whether a saved tensor is neither an argument nor a weight nor a statistic of a norm."""
        return tensor.requires_grad and not tensor.is_leaf and _storage(tensor) not in given


@dataclass(frozen=True)
class Argument:
    """A tensor that a function was given, or what stands for it."""

    saved: Any
    requires_grad: bool

    def tensor(self) -> Tensor:
        return restored(self.saved).detach().requires_grad_(self.requires_grad)


@dataclass(frozen=True)
class Inner:
    """A tensor that autograd has saved inside a function."""

    recipe: Recipe
    number: int

    def tensor(self) -> Tensor:
        return self.recipe.computed()[1][self.number]


@dataclass(frozen=True)
class View:
    """A view of a function's result."""

    recipe: Recipe
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        return self.recipe.computed()[0].view(self.dtype).as_strided(self.size, self.stride, self.offset)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class RandomState:
    """Where torch's random numbers were, on the CPU and on a GPU, for dropout to be the same again."""

    def __init__(self, device: torch.device):
        self.devices = [device] if device.type == "cuda" else []
        self.states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self.devices)]

    @contextmanager
    def restored(self) -> Iterator[None]:
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.states[0])
            for device, state in zip(self.devices, self.states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
