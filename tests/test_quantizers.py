"""EWGS: outputs and gradients against the formulas in float64 by autograd, for every dtype, size and layout."""

from __future__ import annotations

import pytest
import torch
from tensors import DTYPES, LAYOUTS, randn, with_offset
from torch import Tensor

from benchmarks.ewgs import eager_ewgs
from r2_kernels import ewgs, ewgs_ops, use_backend

ENDS = (-1.25, 1.5, -0.75, 0.5)
SIZES = (0, 1, 2, 15, 16, 17, 31, 33, 1023, 1025, 16385, 50_001)
DELTA = 0.3
# Of what is stored, half a unit in the last place; and how far x, computed in float32, may be off.
STORAGE = {torch.float64: 2**-53, torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
ARITHMETIC = {dtype: 1e-13 if dtype is torch.float64 else 1e-6 for dtype in DTYPES}


def oracle(values: Tensor, levels: int, delta: float, upstream: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Outputs, gradients of the values and of the four ends, by autograd in float64."""
    wide = values.detach().double().requires_grad_()
    lower, upper, first, last = ends = [torch.tensor(end, dtype=torch.float64, requires_grad=True) for end in ENDS]
    outputs = eager_ewgs(wide, lower, upper, first, last, levels, delta)
    outputs.backward(upstream.double())
    return outputs.detach(), wide.grad, [end.grad for end in ends]


def away_from_ties(values: Tensor, levels: int) -> Tensor:
    """The values, those moved that lie so near the middle between two levels that rounding errors decide."""
    x = (values.double() - ENDS[0]) / (ENDS[1] - ENDS[0]) * (levels - 1)
    is_near = ((x - x.floor() - 0.5).abs() < 1e-4) & (x > 0) & (x < levels - 1)
    return values.copy_(torch.where(is_near, torch.tensor(ENDS[0] + 0.01, dtype=torch.float64), values.double()))


def check(values: Tensor, levels: int = 4, delta: float = DELTA) -> None:
    dtype = values.dtype
    values = values.detach()
    upstream = randn(values.numel(), dtype=dtype).reshape(values.shape)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    ends = [torch.tensor(end, dtype=wide, requires_grad=True) for end in ENDS]
    leaf = values.requires_grad_()
    outputs = ewgs(leaf, *ends, levels, delta)
    outputs.backward(upstream)
    wanted, of_values, of_ends = oracle(values, levels, delta, upstream)
    assert outputs.dtype is dtype
    assert leaf.grad is not None
    assert leaf.grad.dtype is dtype
    tolerance, rounding = ARITHMETIC[dtype], STORAGE[dtype]
    torch.testing.assert_close(outputs.detach().double(), wanted, rtol=rounding, atol=tolerance)
    scale = upstream.double().abs().max().item() if upstream.numel() else 1.0
    torch.testing.assert_close(leaf.grad.double(), of_values, rtol=rounding, atol=tolerance * (levels + scale))
    # Sums of either sign: relative to the sum of magnitudes.
    total = upstream.double().abs().sum().item()
    for end, gradient in zip(ends, of_ends, strict=True):
        assert end.grad is not None
        torch.testing.assert_close(end.grad.double(), gradient, rtol=2 * tolerance, atol=tolerance * total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_every_size_and_dtype(backend: str, size: int, dtype: torch.dtype) -> None:
    check(away_from_ties(randn(size, dtype=dtype), 4))


@pytest.mark.parametrize("levels", [2, 3, 4, 16, 255])
@pytest.mark.parametrize("delta", [0.0, 1e-3, 0.5])
def test_levels_and_delta(backend: str, levels: int, delta: float) -> None:
    check(away_from_ties(randn(999), levels), levels, delta)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layout(backend: str, layout: str, dtype: torch.dtype) -> None:
    values = LAYOUTS[layout](dtype, torch.device("cpu"))
    if "expanded" not in layout and "unfold" not in layout:
        away_from_ties(values, 4)
    check(values)


@pytest.mark.parametrize("offset", range(1, 9))
def test_misaligned(backend: str, offset: int) -> None:
    check(with_offset(away_from_ties(randn(1000, dtype=torch.bfloat16), 4), offset))


def test_the_gradient_may_lie_in_another_order(backend: str) -> None:
    values = away_from_ties(randn(6, 5, 4, 3), 4).to(memory_format=torch.channels_last).requires_grad_()
    upstream = randn(6, 5, 4, 3)
    ends = [torch.tensor(end) for end in ENDS]
    ewgs(values, *ends, 4, DELTA).backward(upstream)
    _, wanted, _ = oracle(values, 4, DELTA, upstream)
    torch.testing.assert_close(values.grad.double(), wanted, rtol=1e-6, atol=1e-5)


def test_gradients_by_hand(backend: str) -> None:
    """Three levels between -1 and 1 give -3, 0 and 3; x of 0.6 is 0.8, of 0.4 it is 0.7, of -0.2 it is 0.4."""
    values = torch.tensor([0.6, 0.4, -0.2, 5.0], dtype=torch.float64, requires_grad=True)
    ends = [torch.tensor(end, dtype=torch.float64, requires_grad=True) for end in (-1.0, 1.0, -3.0, 3.0)]
    outputs = ewgs(values, *ends, 3, 0.5)
    outputs.backward(torch.tensor([1.0, -1.0, 2.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(outputs.tolist(), [3.0, 0.0, 0.0, 3.0])
    # g is 6, -6, 12; x - x_q is -0.2, 0.2, -0.1.
    scaled = torch.tensor([6 * (1 - 0.1), -6 * (1 - 0.1), 12 * (1 - 0.05), 0.0], dtype=torch.float64)
    torch.testing.assert_close(values.grad, scaled / 2)
    x = torch.tensor([0.8, 0.7, 0.4, 0.0], dtype=torch.float64)
    wanted = [(scaled * (x - 1)).sum() / 2, -(scaled * x).sum() / 2, 0.5, 2.5]
    torch.testing.assert_close([end.grad.item() for end in ends], [float(number) for number in wanted])


def test_nan_and_infinity(backend: str) -> None:
    values = torch.tensor([0.1, float("nan"), float("inf"), -float("inf")] + [0.3] * 40, requires_grad=True)
    ends = [torch.tensor(end, requires_grad=True) for end in ENDS]
    outputs = ewgs(values, *ends, 4, DELTA)
    assert outputs[1].isnan()
    assert outputs[2] == ENDS[3]
    assert outputs[3] == ENDS[2]
    assert outputs.isnan().sum() == 1
    outputs.backward(torch.ones(44))
    # A NaN lies between no bounds: it has no gradient and gives the bounds none; the levels' outputs get its NaN.
    assert values.grad.isfinite().all()
    assert (values.grad[1:4] == 0).all()
    assert values.grad[0] > 0


def test_the_ends_come_out_exactly(backend: str) -> None:
    values = torch.tensor([-9.0, -1.25, 1.5, 9.0])
    ends = [torch.tensor(end) for end in (-1.25, 1.5, -0.1, 0.7)]
    for levels in (2, 50, 65_536):
        assert torch.equal(ewgs(values, *ends, levels), torch.tensor([-0.1, -0.1, 0.7, 0.7]))


@pytest.mark.large
def test_the_same_for_any_number_of_threads(backend: str) -> None:
    values, upstream = randn(300_001), randn(300_001)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            leaf = values.clone().requires_grad_()
            ends = [torch.tensor(end, requires_grad=True) for end in ENDS]
            outputs = ewgs(leaf, *ends, 4, DELTA)
            outputs.backward(upstream)
            results.append([outputs.detach(), leaf.grad, *(end.grad for end in ends)])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(result, results[0], strict=True))


@pytest.mark.parametrize("case", ["contiguous", "strided", "channels_last", "empty"])
@pytest.mark.parametrize("operator", list(ewgs_ops.SCHEMAS))
def test_opcheck(operator: str, case: str) -> None:
    values = {
        "contiguous": randn(5, 7),
        "strided": randn(9, 8)[::2, 1:],
        "channels_last": randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "empty": randn(0, 3),
    }[case]
    ends = torch.tensor(ENDS)
    arguments = (values, ends, 4) if operator == "ewgs_forward" else (values, ends, randn(*values.shape), 4, DELTA)
    with use_backend("cpu"):
        torch.library.opcheck(getattr(torch.ops.r2_kernels, operator).default, arguments)


def test_bad_arguments_are_named() -> None:
    values, end = randn(3), torch.tensor(1.0)
    with pytest.raises(TypeError, match=r"values: .*int64"):
        ewgs(torch.arange(3), end, end, end, end, 4)
    with pytest.raises(TypeError, match="upper: expected a tensor"):
        ewgs(values, end, 1.0, end, end, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="last: expected one number"):
        ewgs(values, end, end, end, torch.ones(2), 4)
    for levels in (1, 65_537):
        with pytest.raises(ValueError, match="levels: expected 2"):
            ewgs(values, end, end, end, end, levels)
    with pytest.raises(TypeError, match="levels: expected an integer"):
        ewgs(values, end, end, end, end, 4.0)  # type: ignore[arg-type]
