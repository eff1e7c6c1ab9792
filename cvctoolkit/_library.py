"""How an operator of ``cvctoolkit::*`` is defined: schema, backends, fake implementation, autograd.

One public operator per op, its schema in Python; the operator's body picks the backend, so dispatch, autograd,
``torch.compile`` and ``opcheck`` see a single operator whatever runs inside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch.autograd import forward_ad

from cvctoolkit._backend import Backend, device_of, select

_LIBRARY = torch.library.Library("cvctoolkit", "DEF")

# The calls since `record_calls` was entered, for the contract tests.
_recorded: list[tuple[Operator, tuple[Any, ...]]] | None = None

#: Every operator by name, for ``cvctoolkit info`` and the contract tests.
OPERATORS: dict[str, Operator] = {}


class Operator:
    """A registered operator. Call it with all schema arguments in order, then the wished backend."""

    def __init__(self, name: str, backends: dict[str, Backend]) -> None:
        self.name = name
        self.backends = backends
        self.overload = getattr(torch.ops.cvctoolkit, name).default
        # Where the schema has tensors, or lists of them: a call looks for gradients there only.
        self._slots = [i for i, a in enumerate(self.overload._schema.arguments) if "Tensor" in str(a.type)]

    def __call__(self, *args: Any, backend: str | None = None) -> Any:
        if backend is not None and not isinstance(backend, str):
            raise TypeError(f"{self.name}: backend must be a string or None, got {type(backend).__name__}")
        if _recorded is not None:
            _recorded.append((self, (*args, backend or "")))
        # torch would drop the tangents of an operator without a forward-mode formula, and give zero derivatives.
        if forward_ad._current_level >= 0 and any(_has_tangent(args[i]) for i in self._slots):
            raise RuntimeError(f"{self.name}: forward-mode differentiation is not implemented")
        # Without a gradient to record, the autograd kernel (Python, as every one of torch.library) is passed by.
        recorded = torch.is_grad_enabled() and any(_requires_grad(args[i]) for i in self._slots)
        if not recorded and not torch.compiler.is_compiling():
            with torch._C._AutoDispatchBelowAutograd():
                return self.overload(*args, backend or "")
        return self.overload(*args, backend or "")

    def _body(self, *args: Any) -> Any:
        inputs = args[:-1]
        device = device_of(inputs).type
        run = select(self.name, self.backends, args[-1], inputs, device).run
        if not torch.is_autocast_enabled(device):
            return run(*inputs)
        # An operator chooses its own precision: autocast would round the products inside a reference.
        with torch.autocast(device, enabled=False):
            return run(*inputs)


def _requires_grad(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.requires_grad
    return value is not None and any(map(_requires_grad, value))


def _has_tangent(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return forward_ad.unpack_dual(value).tangent is not None
    return value is not None and any(map(_has_tangent, value))


@contextmanager
def record_calls() -> Iterator[list[tuple[Operator, tuple[Any, ...]]]]:
    """Collects (operator, arguments) of every call in the block: what a public function asks of the dispatcher."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def define_op(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    native: Backend | None = None,
    triton: Backend | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    **composed: Backend,
) -> Operator:
    """Registers ``cvctoolkit::name``.

    Its gradients are for ``torch.autograd``: ``torch.func.grad`` and ``torch.func.jacrev`` raise ``RuntimeError``, as
    they do for every ``torch.library`` operator.

    Args:
        name: The operator's name, that of its public function where there is one.
        schema: ``"(Tensor points, float radius) -> Tensor"``; ``str backend`` is added as the last argument. All
            arguments are positional.
        fake: Shapes and dtypes of the result for the schema's arguments; data-dependent sizes through
            ``torch.library.get_ctx().new_dynamic_size()``.
        reference: The specification; takes the schema's arguments.
        native: The C++/CUDA kernels.
        triton: The Triton kernels.
        setup_context: ``(ctx, inputs, output)``; see ``torch.library.register_autograd``. ``inputs`` ends with the
            backend.
        backward: ``(ctx, *grad_outputs)`` → one gradient per schema argument (that of ``backend`` is added).
            Use differentiable torch operators, or ``once_differentiable`` around a formula that is not.
        **composed: Further backends by name (see ``_backend.ORDER``): compositions of torch's or a package's operators.
    """
    backends = {"native": native, "triton": triton, **composed, "reference": Backend(reference)}
    arguments, returns = schema.rsplit("->", 1)
    arguments = arguments.rstrip().removesuffix(")")
    separator = "" if arguments.strip() == "(" else ", "
    _LIBRARY.define(f"{name}{arguments}{separator}str backend) ->{returns}")
    operator = Operator(name, {k: v for k, v in backends.items() if v is not None})
    _LIBRARY.impl(name, operator._body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cvctoolkit::{name}", lambda *args: fake(*args[:-1]), lib=_LIBRARY)
    if backward is not None:

        def with_backend(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            result = backward(ctx, *grads)
            return (*(result if isinstance(result, tuple) else (result,)), None)

        torch.library.register_autograd(f"cvctoolkit::{name}", with_backend, setup_context=setup_context, lib=_LIBRARY)
    OPERATORS[name] = operator
    return operator


_P = ParamSpec("_P")
_R = TypeVar("_R")


def names_itself(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A public function made of others, or of operators that are called otherwise: their errors name it instead.

    Arguments that it hands on must have the names that they have there.
    """
    name = function.__name__

    @functools.wraps(function)
    def named(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except (TypeError, ValueError, RuntimeError) as error:
            inner, separator, text = str(error).partition(": ")
            if separator and (inner in OPERATORS or inner in _public_names()):
                error.args = (f"{name}: {text}",)
            raise

    return named


def _public_names() -> list[str]:
    from cvctoolkit import ops

    return ops.__all__


class _OnceDifferentiable(torch.autograd.Function):
    """Identity on gradients that cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, name: str, *values: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        ctx.name = name
        return tuple(None if v is None else v.view_as(v) for v in values)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        raise RuntimeError(f"{ctx.name}: double backward is not implemented")


def once_differentiable(name: str, *inputs: torch.Tensor | None) -> tuple[Any, ...]:
    """Passes tensors through such that differentiating what is computed from them raises.

    A backward formula that holds some quantity fixed (the nearest triangle's barycentric coordinates, say) has wrong
    second derivatives: send every tensor that it uses through here first.
    """
    return _OnceDifferentiable.apply(name, *inputs)


def dynamic_sizes(count: int) -> Iterator[Any]:
    """Data-dependent sizes for a fake implementation."""
    context = torch.library.get_ctx()
    return (context.new_dynamic_size() for _ in range(count))
