"""The Triton kernels compiled for GPUs that are not here, and what their machine code must not lose."""

from __future__ import annotations

import os
import re

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from benchmarks.machine_code import (
    DTYPES,
    KERNELS,
    SEGMENTS,
    STEP_DTYPES,
    STEPS,
    STREAMING,
    MachineCode,
    compile_kernel,
    compile_source,
    read,
    read_segments,
    read_step,
    step_source,
)
from r2_kernels.penalties import PENALTIES, RANGE_PENALTIES

# Instructions a thread executes per element of a full, aligned chunk, its share of what a chunk costs once included, in
# 32-bit precision. A tenth above what the compiler makes of the kernels today.
BUDGETS = {
    ("reduce", "linf"): 10.0,
    ("reduce", "margin"): 11.0,
    ("reduce", "soft_min_max"): {4: 31.0, 2: 22.0},
    ("apply", "linf"): 12.5,
    ("apply", "margin"): 9.0,
    ("apply", "soft_min_max"): 33.0,
    ("apply_", "linf"): 14.5,
    ("apply_", "margin"): 13.5,
    ("apply_", "soft_min_max"): 36.0,
}
# The same of an optimizer's step, the slope and the new statistics included.
STEP_BUDGETS = {
    ("adamw", None): 43.0,
    ("adamw", "linf"): 58.0,
    ("adamw", "margin"): 58.0,
    ("adamw", "soft_min_max"): 111.0,
    ("sgd, momentum", None): 16.5,
    ("sgd, momentum", "linf"): 31.0,
    ("sgd, momentum", "margin"): 31.5,
    ("sgd, momentum", "soft_min_max"): 86.0,
}
STOCHASTIC_ROUNDING = 38.0  # on top, of a weight and two states

each_penalty = pytest.mark.parametrize("penalty", PENALTIES)
each_range_penalty = pytest.mark.parametrize("penalty", RANGE_PENALTIES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def machine_code(kernel: str, penalty: str, dtype: torch.dtype, target: str) -> MachineCode:
    return read(compile_kernel(kernel, penalty, dtype, target), kernel, penalty, dtype)


@each_range_penalty
@each_dtype
@pytest.mark.parametrize("kernel", STREAMING)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_machine_code(kernel: str, penalty: str, dtype: torch.dtype, target: str) -> None:
    code = machine_code(kernel, penalty, dtype, target)
    assert code.local == 0
    assert code.spills == 0, "registers are spilled"
    assert code.occupancy >= 0.5, f"{code.registers} registers a thread"
    assert code.vector_loads > 0
    assert (code.vector_stores > 0) == (kernel != "reduce")
    assert code.paths, "no path loads every entry of an aligned chunk 16 bytes at a time"
    if dtype is not torch.float64:
        budget = BUDGETS[kernel, penalty]
        budget = budget[dtype.itemsize] if isinstance(budget, dict) else budget
        assert max(path.per_element for path in code.paths) <= budget
        per_element = max(path.exponentials_per_element for path in code.paths)
        assert per_element <= (2.1 if penalty == "soft_min_max" else 0.1)


@each_dtype
@pytest.mark.parametrize("kernel", STREAMING)
def test_kurtosis_in_float64(kernel: str, dtype: torch.dtype) -> None:
    code = machine_code(kernel, "kurtosis", dtype, "sm_90")
    assert (code.local, code.spills) == (0, 0)
    assert code.occupancy >= 0.25, f"{code.registers} registers a thread"
    assert code.vector_loads > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_small_range_needs_no_exponential(dtype: torch.dtype) -> None:
    code = machine_code("reduce", "soft_min_max", dtype, "sm_90")
    assert [round(path.exponentials_per_element) for path in code.paths] == [0, 2]


@each_penalty
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kernel", ["merge", "finalize"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_kernels_over_statistics(kernel: str, penalty: str, dtype: torch.dtype, target: str) -> None:
    assert compile_kernel(kernel, penalty, dtype, target).asm["cubin"]


@each_penalty
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
@pytest.mark.parametrize("kernel", SEGMENTS)
def test_kernels_over_segments(kernel: str, penalty: str, dtype: torch.dtype) -> None:
    """They spill nothing, and but for soft-min-max let a third of a processor's threads run, kurtosis a quarter."""
    code = read_segments(compile_kernel(kernel, penalty, dtype, "sm_90"))
    assert (code.local, code.spills) == (0, 0)
    if penalty != "soft_min_max":
        least = 1 / 4 if penalty == "kurtosis" else 1 / 3  # it is in float64 whatever the dtype
        assert code.occupancy >= least, f"{code.registers} registers a thread"
    assert compile_kernel(kernel, penalty, dtype, "gfx942").asm["hsaco"]


@each_penalty
@each_dtype
@pytest.mark.parametrize("kernel", KERNELS)
def test_amd(kernel: str, penalty: str, dtype: torch.dtype) -> None:
    """Compiles, spills nothing, and loads and stores 16 bytes at a time."""
    compiled = compile_kernel(kernel, penalty, dtype, "gfx942")
    assert compiled.asm["hsaco"]
    if kernel in STREAMING:
        text = compiled.asm["amdgcn"]
        assert re.search("(global|buffer)_load_dwordx4", text)
        assert bool(re.search("(global|buffer)_store_dwordx4", text)) == (kernel != "reduce")
        assert ".vgpr_spill_count: 0" in text
        code = machine_code(kernel, penalty, dtype, "gfx942")
        assert (code.spills, code.local) == (0, 0)
        assert code.occupancy >= 0.5, f"{code.registers} registers a thread"
        assert code.paths, "no path loads every entry of an aligned chunk 16 bytes at a time"


# Compiling takes seconds each: the others run with the slow tests.
STEP_CASES = [
    ("adamw", "float32", "sm_90"),
    ("adamw", "bfloat16", "sm_90"),
    ("adamw", "float32", "sm_100"),
    ("adamw, stochastic", "bfloat16", "sm_90"),
    ("sgd, momentum", "float32", "sm_90"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("adamw", "float32, bfloat16 gradients", "sm_90"),
            ("adamw", "bfloat16, float32 states", "sm_90"),
            ("adamw", "bfloat16", "sm_80"),
            ("adamw", "bfloat16", "sm_100"),
            ("adamw", "float32", "sm_80"),
            ("sgd, momentum", "float32, bfloat16 gradients", "sm_90"),
            ("sgd, momentum", "bfloat16, float32 states", "sm_90"),
            ("sgd, momentum", "bfloat16", "sm_90"),
        )
    ),
]
# One or two addresses, once a chunk: no loop over whole chunks reads them.
STEP_SPILLS = {("margin", "float32", "sm_100"): 2, ("margin", "bfloat16", "sm_90"): 4}


@pytest.mark.parametrize("penalty", [None, *RANGE_PENALTIES])
@pytest.mark.parametrize(("step", "dtypes", "target"), STEP_CASES)
def test_machine_code_of_steps(step: str, dtypes: str, target: str, penalty: str | None) -> None:
    arguments = (penalty, STEP_DTYPES[dtypes], STEPS[step])
    code = read_step(compile_source(step_source("step", *arguments), target), *arguments)
    assert code.spills <= STEP_SPILLS.get((penalty, dtypes, target), 0), "registers are spilled"
    assert code.local == 0
    assert code.occupancy >= (0.5 if STEP_DTYPES[dtypes].weight is torch.float32 else 0.375)
    assert code.vector_loads > 0
    assert code.vector_stores > 0
    assert code.paths, "no path loads every entry of aligned arrays 16 bytes at a time"
    rule, *rounding = step.split(", stochastic")
    budget = STEP_BUDGETS[rule, penalty] + (STOCHASTIC_ROUNDING if rounding else 0)
    assert max(path.per_element for path in code.paths) <= budget


@pytest.mark.parametrize("penalty", [None, *RANGE_PENALTIES])
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_steps_are_finished(target: str, penalty: str | None) -> None:
    source = step_source("finish", penalty, STEP_DTYPES["float32"], STEPS["adamw"])
    assert compile_source(source, target).asm["hsaco" if target == "gfx942" else "cubin"]


@pytest.mark.parametrize("penalty", [None, *RANGE_PENALTIES])
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16"])
def test_steps_on_amd(dtypes: str, penalty: str | None) -> None:
    source = step_source("step", penalty, STEP_DTYPES[dtypes], STEPS["adamw"], is_amd=True)
    text = compile_source(source, "gfx942").asm["amdgcn"]
    assert re.search("(global|buffer)_load_dwordx4", text)
    assert re.search("(global|buffer)_store_dwordx4", text)
    assert ".vgpr_spill_count: 0" in text
