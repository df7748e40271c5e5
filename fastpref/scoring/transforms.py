# SPDX-License-Identifier: Apache-2.0
"""The engine's node where something stands between a call and its tensors: torch.func's transforms,
batches of upstream gradients, fake tensors, and make_fx.

torch.func takes a node apart: what is saved must be an input or an output of it, which that of
autograd.py, saving more and less as memory allows, is not. There the operators' two functions are
nodes themselves. A batch of gradients or of arguments is worked through one element after the
other, each at the cost of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

SECOND_DERIVATIVE = (
    "fastpref's fused head has no second derivative; where one is needed, score with plain torch: "
    "(hidden @ weight.T).log_softmax(-1)"
)
FORWARD_MODE = (
    "fastpref's fused head has no forward-mode derivative (jvp, jacfwd, hessian); use reverse mode "
    "(grad, vjp, jacrev), or score with plain torch: (hidden @ weight.T).log_softmax(-1)"
)

Tensors: TypeAlias = tuple[Tensor | None, ...]


def active() -> bool:
    """Whether a transform of torch.func is under way."""
    return torch._C._are_functorch_transforms_active()


def maps() -> bool:
    """Whether torch.func.vmap is among them."""
    if not active():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(one.key() == torch._C._functorch.TransformType.Vmap for one in stack)


def without_values(tensor: Tensor) -> bool:
    """Whether no shape may follow from the values of tensors like this one: it has none, or those
    of a batch that is mapped over."""
    return isinstance(tensor, FakeTensor) or maps()


def needs_operators(tensor: Tensor) -> bool:
    """Whether the engine must run as operators on tensors like this one."""
    if torch.compiler.is_compiling() or active() or isinstance(tensor, FakeTensor):
        return True
    return _is_recorded()


def _is_recorded() -> bool:
    """Whether make_fx writes down what runs: of workspace that other calls use after it, else."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def requires_grad(tensor: Tensor) -> bool:
    """In any of the transforms that are under way."""
    if tensor.requires_grad or not active():
        return tensor.requires_grad
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
        if tensor.requires_grad:
            return True
    return False


class Differentiable(torch.autograd.Function):
    """A node that has a first derivative, in reverse mode alone."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(FORWARD_MODE)


class Parts(Protocol):
    """What ``Transformed`` is made of."""

    def forward(self, *arguments: Any) -> tuple[Tensor, ...]: ...

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None: ...

    def differentiate(self, ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]: ...


class Transformed(Differentiable):
    """An operator and its gradient, as torch.func takes them."""

    @staticmethod
    def forward(parts: Parts, *arguments: Any) -> tuple[Tensor, ...]:
        return parts.forward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.parts = inputs[0]
        ctx.parts.save(ctx, inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        return None, *ctx.parts.differentiate(ctx, *upstream)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return _one_by_one(Transformed, info.batch_size, in_dims, arguments)


class _Applied(Differentiable):
    """A function of tensors, which has no derivative."""

    @staticmethod
    def forward(function: Callable[..., Tensors], *tensors: Tensor | None) -> Tensors:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        raise RuntimeError(SECOND_DERIVATIVE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return _one_by_one(_Applied, info.batch_size, in_dims, arguments)


def plain(*tensors: Tensor | None) -> bool:
    """Whether none is a batch in which torch.func.vmap or ``is_grads_batched`` hands gradients
    over, and nothing transforms what is made of them."""
    if active():
        return False
    for one in tensors:
        if one is not None and torch._C._functorch.is_legacy_batchedtensor(one):
            return False
    return True


def for_each(function: Callable[..., Tensors], *tensors: Tensor | None) -> Tensors:
    """``function(*tensors)``; of batches of tensors, in which torch.func.vmap or
    ``is_grads_batched`` hands gradients over, of each element in turn."""
    if active():
        found: Tensors = _Applied.apply(function, *tensors)  # type: ignore[no-untyped-call]
        return found
    if plain(*tensors):
        return function(*tensors)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return _of_level(level, function, tensors)


def _of_level(level: int, function: Callable[..., Tensors], tensors: Tensors) -> Tensors:
    """``for_each`` of batches that ``is_grads_batched`` has made, those of ``level`` and below."""
    if not level:
        return function(*tensors)
    # Of what is no batch of this level: one of a single element.
    batches = [
        None if one is None else torch._remove_batch_dim(one, level, 1, 0) for one in tensors
    ]
    size = max(one.shape[0] for one in batches if one is not None)
    found = []
    for i in range(size):
        chosen = tuple(None if one is None else one[min(i, len(one) - 1)] for one in batches)
        found.append(_of_level(level - 1, function, chosen))
    return tuple(
        None if one is None else torch._add_batch_dim(one, 0, level) for one in _stacked(found)
    )


def _one_by_one(
    node: type[Differentiable], size: int, in_dims: Sequence[int | None], arguments: Sequence[Any]
) -> tuple[Tensors, tuple[int | None, ...]]:
    """The results of ``node`` for each of a batch of arguments, and where their batches lie."""
    found = []
    for i in range(size):
        pairs = zip(arguments, in_dims, strict=True)
        chosen = [one if at is None else one.select(at, i) for one, at in pairs]
        found.append(node.apply(*chosen))  # type: ignore[no-untyped-call]
    batch = _stacked(found)
    return batch, tuple(None if one is None else 0 for one in batch)


def _stacked(found: Sequence[Tensors]) -> Tensors:
    columns = zip(*found, strict=True)
    return tuple(None if parts[0] is None else torch.stack(parts) for parts in columns)
