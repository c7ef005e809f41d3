"""What the kernels are measured against: one step's penalty, value and gradients, by other means."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from r2_kernels import RangeRegularizer, functional, reference

STRENGTH = 0.01
# 1 % of normal weights of standard deviation 0.02 lie outside.
MARGIN = 2.576 * 0.02
TEMPERATURE = 0.1


def parameter(penalty: str, count: int) -> list[Tensor]:
    """M or the temperature as the functions take it: nothing for L∞."""
    start = {"linf": None, "margin": MARGIN, "soft_min_max": TEMPERATURE}[penalty]
    return [] if start is None else [torch.full((count,), start, requires_grad=True)]


def in_place(penalty: str, weights: Sequence[Tensor]) -> Callable[[], object]:
    """The fused pass: gradients added to those that are there."""
    parameters = [nn.Parameter(weight) for weight in weights]
    for weight in parameters:
        weight.grad = torch.zeros_like(weight)
    start = {} if penalty == "linf" else {"margin": 2.576} if penalty == "margin" else {"temperature": TEMPERATURE}
    regularizer = RangeRegularizer(
        [(str(index), weight) for index, weight in enumerate(parameters)],
        penalty,
        strength=STRENGTH,
        include="*",
        **start,
    )
    return regularizer.add_gradients_


def through_autograd(penalty: str, weights: Sequence[Tensor]) -> Callable[[], object]:
    """The fused kernels behind autograd: fresh gradients each time."""
    return _differentiated(getattr(functional, penalty), penalty, weights)


def eager(penalty: str, weights: Sequence[Tensor]) -> Callable[[], object]:
    """The same formulas in PyTorch."""
    return _differentiated(getattr(reference, penalty), penalty, weights)


def compiled(penalty: str, weights: Sequence[Tensor]) -> Callable[[], object]:
    """The same formulas under torch.compile."""
    torch._dynamo.reset()
    return _differentiated(torch.compile(getattr(reference, penalty)), penalty, weights)


def foreach_norm(penalty: str, weights: Sequence[Tensor]) -> Callable[[], object]:
    """torch._foreach_norm(weights, inf), values only: what PyTorch has for L∞."""
    if penalty != "linf":
        raise ValueError(f"no torch._foreach function computes {penalty}")
    return lambda: torch._foreach_norm(list(weights), float("inf"))


def _differentiated(function: Callable[..., Tensor], penalty: str, weights: Sequence[Tensor]) -> Callable[[], object]:
    leaves = [weight.detach().requires_grad_() for weight in weights]
    extra = parameter(penalty, len(leaves))

    def step() -> None:
        for leaf in (*leaves, *extra):
            leaf.grad = None
        (STRENGTH * function(leaves, *extra).sum()).backward()

    return step


PEERS: dict[str, Callable[[str, Sequence[Tensor]], Callable[[], object]]] = {
    "r2_kernels in place": in_place,
    "r2_kernels autograd": through_autograd,
    "torch.compile": compiled,
    "eager PyTorch": eager,
    "_foreach_norm, value only": foreach_norm,
}


def has_penalty(peer: str, penalty: str) -> bool:
    """Whether the peer computes the penalty: of torch's foreach functions there is one for L∞ alone."""
    return penalty == "linf" or PEERS[peer] is not foreach_norm
