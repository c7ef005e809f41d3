"""The Triton kernels compiled ahead of time, and what their machine code says: no GPU is needed.

``compile_kernel`` builds exactly what the backend launches, for any architecture; ``read`` disassembles an NVIDIA
binary with the tools that come with Triton, or takes AMD's assembly, and follows its control flow along the path that
loads 16 bytes at a time.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from r2_kernels.backends.triton import operators, segment_operators, step_operators
from r2_kernels.backends.triton.apply_kernel import apply_chunks
from r2_kernels.backends.triton.penalties import FUNCTIONS
from r2_kernels.backends.triton.reduce_kernels import finalize_rows, merge_chunks, reduce_chunks
from r2_kernels.backends.triton.segment_kernels import (
    apply_segments,
    finish_segments,
    prepare_segments,
    reduce_segments,
)
from r2_kernels.backends.triton.step_kernel import finish_tensors, step_chunks
from r2_kernels.backends.triton.step_operators import Variant
from r2_kernels.backends.triton.step_table import Dtypes
from r2_kernels.penalties import CHUNK_SIZE, PENALTIES

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STREAMING = ("reduce", "apply", "apply_")
STEPS = {
    "adamw": Variant("adamw", 2),
    "adamw, stochastic": Variant("adamw", 2, is_stochastic=True),
    "sgd, momentum": Variant("sgd", 1),
}
# Of the weights, the gradients, the states and the counts of steps.
STEP_DTYPES = {
    "float32": Dtypes(torch.float32, torch.float32, torch.float32, torch.float32),
    "float32, bfloat16 gradients": Dtypes(torch.float32, torch.bfloat16, torch.float32, torch.float32),
    "bfloat16, float32 states": Dtypes(torch.bfloat16, torch.bfloat16, torch.float32, torch.float32),
    "bfloat16": Dtypes(torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32),
}
SEGMENTS = ("reduce segments", "finish segments", "prepare segments", "apply_ segments")
KERNELS = (*STREAMING, "merge", "finalize")
# Of the kernels over segments.
GROUP_SIZE = 128
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Source(NamedTuple):
    """A kernel with the types of its arguments and its compile-time arguments."""

    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]


def source(kernel: str, penalty: str, dtype: torch.dtype, is_amd: bool = False) -> Source:
    """What the backend launches for float32 parameters: ``apply`` writes gradients, ``apply_`` adds to them.

    Those for segments are for groups of GROUP_SIZE, each with a parameter of its own.
    """
    sums = "*fp64" if dtype is torch.float64 else "*fp32"
    has_parameter = PENALTIES[penalty].parameter is not None
    parameters = {"parameters": "*fp32" if has_parameter else None, "parameter_stride": 1}
    maxima = "*fp64" if PENALTIES[penalty].is_sparse else None
    slopes = "*fp32" if has_parameter else None
    arguments: dict[str, Any]
    if kernel == "reduce":
        function, constants = reduce_chunks, operators.reduce_constants(penalty, dtype, is_amd)
        arguments = {"chunks": "*i32", "segments": "*i64", **parameters, "sums": sums, "all_chunks": "i64"}
    elif kernel == "merge":
        function, constants = merge_chunks, operators.merge_constants(penalty, dtype)
        arguments = {"rows": "*i32", "segments": "*i64", **parameters, "sums": sums, "all_chunks": "i64"}
        arguments |= {"statistics": "*fp64", "values": "*fp32", "slopes": slopes, "maxima": maxima}
    elif kernel == "finalize":
        function, constants = finalize_rows, operators.finalize_constants(penalty)
        arguments = {"statistics": "*fp64", **parameters, "values": "*fp32", "slopes": slopes, "count": "i32"}
    elif kernel == "reduce segments":
        function, constants = reduce_segments, segment_operators.reduce_constants(penalty, dtype, GROUP_SIZE, False)
        arguments = {"tiles": "*i32", "weights": "*i64", **parameters, "sums": sums, "count": "i64"}
    elif kernel == "finish segments":
        function, constants = finish_segments, segment_operators.finish_constants(penalty, dtype, False)
        arguments = {"lanes": "*i32", "weights": "*i64", **parameters, "sums": sums, "count": "i64"}
        arguments |= {"statistics": "*fp64", "values": "*fp32", "slopes": slopes}
    elif kernel == "prepare segments":
        function, constants = prepare_segments, segment_operators.prepare_constants(penalty, dtype, False, True)
        arguments = {"lanes": "*i32", "weights": "*i64", **parameters, "coefficients": "*fp32"}
        arguments |= {"coefficient_stride": 1, "statistics": "*fp64", "prepared": sums, "count": "i64"}
    elif kernel == "apply_ segments":
        function, constants = apply_segments, segment_operators.apply_constants(penalty, dtype, GROUP_SIZE, True)
        arguments = {"tiles": "*i32", "weights": "*i64", "destinations": "*i64", "prepared": sums, "count": "i64"}
    else:
        function, constants = apply_chunks, operators.apply_constants(penalty, dtype, kernel == "apply_", is_amd)
        arguments = {"chunks": "*i32", "segments": "*i64", "destinations": "*i64", **parameters}
        arguments |= {"coefficients": "*fp32", "coefficient_stride": 1, "statistics": "*fp64", "maxima": maxima}
    return _source(function, arguments, constants)


def step_source(kernel: str, penalty: str | None, dtypes: Dtypes, variant: Variant, is_amd: bool = False) -> Source:
    """What the backend launches for a step, ``step`` or ``finish``, with everything that may be given."""
    sums = "*fp64" if dtypes.weight is torch.float64 else "*fp32"
    has_parameter = penalty is not None and PENALTIES[penalty].parameter is not None
    own = "*fp32" if has_parameter else None
    maxima = "*fp64" if penalty is not None and PENALTIES[penalty].is_sparse else None
    is_watched = penalty is not None
    counts = "*i64" if variant.rule == "adamw" else None
    gathered = {"sums": sums if is_watched else None, "all_chunks": "i32"}
    statistics = {"statistics": "*fp64" if is_watched else None}
    arguments: dict[str, Any]
    if kernel == "finish":
        arguments = {"rows": "*i32", "counts": counts, "found_inf": "*fp32", "watched": "i32", "segments": "*i64"}
        arguments |= {"parameters": own, "parameter_stride": 1, **gathered, **statistics}
        arguments |= {"values": gathered["sums"], "maxima": maxima}
        return _source(finish_tensors, arguments, step_operators.finish_constants(penalty, dtypes))
    arguments = {"chunks": "*i32", "segments": "*i64", "gradients": "*i64", "states": "*i64", "counts": counts}
    arguments |= {"started": "*i8" if variant.rule == "sgd" else None, "lr": "*fp64"}
    arguments |= dict.fromkeys(("grad_scale", "found_inf", "clip_coefficient"), "*fp32")
    arguments |= dict.fromkeys((f"setting{index}" for index in range(6)), "fp64")
    arguments |= {"rounding_seed": "i64", "watched": "i32", "parameters": own, "parameter_stride": 1}
    arguments |= {"next_parameters": own, "next_parameter_stride": 1}
    arguments |= {"coefficients": "*fp32" if is_watched else None, "coefficient_stride": 1}
    arguments |= {**statistics, "maxima": maxima, **gathered}
    return _source(step_chunks, arguments, step_operators.step_constants(penalty, dtypes, variant, is_amd))


def _source(function: Any, arguments: dict[str, Any], constants: dict[str, Any]) -> Source:
    options = {name: constants[name] for name in ("num_warps", "maxnreg") if name in constants}
    fixed = {name: value for name, value in constants.items() if name not in options}
    fixed |= {name: value for name, value in arguments.items() if not isinstance(value, str)}
    signature = {name: value for name, value in arguments.items() if isinstance(value, str)}
    ordered = {name: signature.get(name, "constexpr") for name in function.arg_names}
    return Source(function, ordered, fixed, options)


def compile_kernel(kernel: str, penalty: str, dtype: torch.dtype, target: str) -> Any:
    """The compiled kernel; its ``asm`` holds every stage, ``metadata`` what was chosen. Triton caches it on disk."""
    return compile_source(source(kernel, penalty, dtype, TARGETS[target].backend == "hip"), target)


def compile_source(given: Source, target: str) -> Any:
    """The same, of any source."""
    function, signature, constants, options = given
    return triton.compile(ASTSource(function, signature, constants), target=TARGETS[target], options=options)


@dataclass(frozen=True)
class Path16:
    """What one thread executes for a full, aligned chunk."""

    instructions: int
    exponentials: int  # MUFU operations
    shuffles: int
    elements: int

    @property
    def per_element(self) -> float:
        return self.instructions / self.elements

    @property
    def exponentials_per_element(self) -> float:
        return self.exponentials / self.elements

    @property
    def shuffles_per_element(self) -> float:
        return self.shuffles / self.elements


@dataclass(frozen=True)
class MachineCode:
    """What a binary needs and does."""

    registers: int
    register_file: int  # registers of a processor
    stack: int
    local: int
    spills: int  # instructions that load from or store to local memory
    threads: int
    vector_loads: int
    vector_stores: int
    paths: tuple[Path16, ...]  # the costliest for each number of MUFU operations, fewest first

    @property
    def occupancy(self) -> float:
        """The share of a processor's 2048 threads that its registers allow."""
        per_thread = (self.registers + 7) // 8 * 8
        return min(self.register_file // (per_thread * self.threads) * self.threads, 2048) / 2048


def read(compiled: Any, kernel: str, penalty: str, dtype: torch.dtype) -> MachineCode:
    """The machine code of ``reduce``, ``apply`` or ``apply_``."""
    # How often an entry is loaded, and how often by one loop: a reduction with extremes looks twice, in two loops, and
    # the loop that adds to gradients loads these too.
    looks = (2 if FUNCTIONS[penalty].ends else 1) if kernel == "reduce" else 0
    streams = {"reduce": 0, "apply": 1, "apply_": 2}[kernel]
    return _read(compiled, dtype, streams, looks)


def read_step(compiled: Any, penalty: str | None, dtypes: Dtypes, variant: Variant) -> MachineCode:
    """The machine code of a step."""
    # Arrays of narrower entries than the weight's are loaded by less than 16 bytes at a time, those of wider by more.
    arrays = [dtypes.weight, dtypes.gradient, *[dtypes.state] * variant.states]
    streams = sum(dtype.itemsize // dtypes.weight.itemsize for dtype in arrays)
    looks = 1 if penalty is not None and FUNCTIONS[penalty].ends else 0
    return _read(compiled, dtypes.weight, streams, looks)


def read_segments(compiled: Any) -> MachineCode:
    """The machine code of a kernel over segments, whose loads are narrow, without its paths."""
    return replace(_read(compiled, torch.float32, 0, 0), paths=())


def _read(compiled: Any, dtype: torch.dtype, streams: int, looks: int) -> MachineCode:
    """``streams`` is how many vectors a loop that stores loads for one of the weight's, ``looks`` how often loops that
    only look load the weight."""
    is_amd = "amdgcn" in compiled.asm
    threads = (64 if is_amd else 32) * compiled.metadata.num_warps
    elements = CHUNK_SIZE // threads
    loads = elements // (16 // dtype.itemsize)
    resources, lines = _read_amd(compiled) if is_amd else _read_nvidia(compiled)
    blocks = _basic_blocks(lines)
    opcodes = [opcode for block in blocks for opcode in block.opcodes]
    return MachineCode(
        **resources,
        spills=sum(opcode.startswith(("LDL", "STL", "scratch_")) for opcode in opcodes),
        threads=threads,
        vector_loads=sum(_is_vector_load(opcode) for opcode in opcodes),
        vector_stores=sum(map(_is_vector_store, opcodes)),
        paths=tuple(_paths(blocks, loads, streams, looks, elements)),
    )


class _Line(NamedTuple):
    """A label, or an instruction, with where it jumps to and whether what follows it may run."""

    label: str | None
    opcode: str = ""
    target: str | None = None
    falls_through: bool = True


def _read_nvidia(compiled: Any) -> tuple[dict[str, int], Iterator[_Line]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources = _run("cuobjdump", "--dump-resource-usage", file.name)
        text = _run("nvdisasm", "-c", file.name)
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", resources)
    assert usage is not None, resources
    registers, stack, local = map(int, usage.groups())
    return {"registers": registers, "register_file": 65536, "stack": stack, "local": local}, _nvidia_lines(text)


def _nvidia_lines(text: str) -> Iterator[_Line]:
    for line in text.splitlines():
        label = re.match(r"\s*(\.L_x_\d+|\$[\w$]+):", line)
        if label:
            yield _Line(label[1])
            continue
        instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", line)
        if not instruction:
            continue
        predicate, opcode, operands = instruction.groups()
        # For sm_80, a loop may be left by a call that does not return, of a label and not of a function.
        if opcode.startswith("BRA") or (opcode.startswith("CALL") and ".L_x_" in operands):
            target = re.search(r"\((\.L_x_\d+)\)", operands)
            assert target is not None, line
            is_conditional = predicate is not None or re.match(r"\s*!?U?P\d", operands) is not None
            yield _Line(None, opcode, target[1], is_conditional)
        else:
            ends = opcode.startswith(("EXIT", "RET"))
            if opcode != "NOP":
                yield _Line(None, opcode, None, not ends or predicate is not None)


def _read_amd(compiled: Any) -> tuple[dict[str, int], Iterator[_Line]]:
    text = compiled.asm["amdgcn"]
    registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
    local = re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)
    assert registers is not None
    assert local is not None
    # CDNA 3: four vector units, of 512 registers for each of 64 lanes.
    resources = {"registers": int(registers[1]), "register_file": 4 * 512 * 64, "stack": 0, "local": int(local[1])}
    return resources, _amd_lines(text)


def _amd_lines(text: str) -> Iterator[_Line]:
    for line in text.splitlines():
        label = re.match(r"(\.LBB\d+_\d+):", line)
        if label:
            yield _Line(label[1])
            continue
        instruction = re.match(r"\s+([a-z]\w+)\s*([^;]*)", line)
        if instruction:
            opcode, operands = instruction.groups()
            is_jump = opcode.startswith(("s_branch", "s_cbranch"))
            falls_through = opcode not in ("s_branch", "s_endpgm")
            yield _Line(None, opcode, operands.strip() if is_jump else None, falls_through)
        if line.lstrip().startswith("s_endpgm"):
            return


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _is_vector_load(opcode: str) -> bool:
    return re.match(r"LDG\.E.*\.128|(global|buffer)_load_dwordx4", opcode) is not None


def _is_vector_store(opcode: str) -> bool:
    return re.match(r"STG\.E\.128|(global|buffer)_store_dwordx4", opcode) is not None


@dataclass
class _Block:
    opcodes: list[str]
    successors: list[int]


def _basic_blocks(lines: Iterator[_Line]) -> list[_Block]:
    """The basic blocks of a kernel, in order; the first is the entry."""
    blocks: list[_Block] = [_Block([], [])]
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    starts, falls_through = False, True
    for line in lines:
        if starts or (line.label is not None and blocks[-1].opcodes):
            blocks.append(_Block([], []))
            if falls_through:
                blocks[-2].successors.append(len(blocks) - 1)
            starts, falls_through = False, True
        if line.label is not None:
            labels[line.label] = len(blocks) - 1
            continue
        blocks[-1].opcodes.append(line.opcode)
        if line.target is not None:
            jumps.append((len(blocks) - 1, line.target))
        starts, falls_through = line.target is not None or not line.falls_through, line.falls_through
    for origin, name in jumps:
        blocks[origin].successors.append(labels[name])
    return blocks


class _Cost(NamedTuple):
    loads: int
    exponentials: int
    instructions: int
    shuffles: int

    def __add__(self, other: _Cost) -> _Cost:  # type: ignore[override]
        return _Cost(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: int) -> _Cost:
        return _Cost(*(count * value for value in self))


def _cost(block: _Block) -> _Cost:
    opcodes = block.opcodes
    return _Cost(
        sum(map(_is_vector_load, opcodes)),
        sum(opcode.startswith(("MUFU", "v_exp_", "v_rcp_", "v_rsq_", "v_sqrt_", "v_log_")) for opcode in opcodes),
        # AMD's scalar, memory and vector instructions are issued side by side, of which only the last are counted.
        sum(opcode.startswith("v_") or opcode[0].isupper() for opcode in opcodes),
        sum(opcode.startswith(("SHFL", "ds_bpermute", "ds_swizzle")) for opcode in opcodes),
    )


def _paths(blocks: list[_Block], loads: int, streams: int, looks: int, elements: int) -> Iterator[Path16]:
    """The costliest way from entry to exit for each number of exponentials, of those that load every entry by vectors.

    For a chunk of so many ``loads`` of the weight, a loop that loads k vectors an iteration runs ``loads`` / k times if
    it only looks, ``streams`` times that if it stores. There are ``looks`` and one of these, or straight code in their
    place. Paths with others belong to chunks that are not aligned or not full.
    """
    loop_of = _innermost_loops(blocks)
    # Of a reduction that looks twice, the first look comes first: a path around it is that of another chunk, even where
    # it goes through two of the loops that are there for the second, which exclude each other.
    first_look = next((index for index, block in enumerate(blocks) if _cost(block).loads), 0) if looks == 2 else 0
    best: dict[int, dict[tuple[int, int], _Cost]] = {}
    totals: dict[tuple[int, int], _Cost] = {}
    for index, block in enumerate(blocks):  # Jumps go forward, but for those that close a loop.
        arriving = best.setdefault(index, {})
        if index == 0:
            arriving[(0, 0)] = _Cost(0, 0, 0, 0)
        body = loop_of.get(index)
        cost = _cost(block) if body is None else _loop_cost(blocks, body, index, loads, streams)
        leaving: dict[tuple[int, int], _Cost] = {}
        for before in arriving.values():
            _keep_costliest(leaving, before + cost)
        exits = block.successors if body is None else _loop_exits(blocks, body)
        if index < first_look:
            exits = [successor for successor in exits if successor <= first_look]
        for successor in exits:
            for after in leaving.values():
                _keep_costliest(best.setdefault(successor, {}), after)
        if not exits:
            for after in leaving.values():
                _keep_costliest(totals, after)
    for (path_loads, exponentials), cost in sorted(totals.items(), key=lambda item: item[0][1]):
        if path_loads == loads * (streams + looks):
            yield Path16(cost.instructions, exponentials, cost.shuffles, elements)


def _keep_costliest(costs: dict[tuple[int, int], _Cost], cost: _Cost) -> None:
    key = (cost.loads, cost.exponentials)
    if key not in costs or costs[key].instructions < cost.instructions:
        costs[key] = cost


def _innermost_loops(blocks: list[_Block]) -> dict[int, set[int]]:
    """Every loop by its head: the blocks between a backward jump and its target, in the order of the code."""
    loops: dict[int, set[int]] = {}
    for index, block in enumerate(blocks):
        for successor in block.successors:
            if successor <= index:
                loops.setdefault(successor, set()).update(range(successor, index + 1))
    return {head: body for head, body in loops.items() if _cost(_joined(blocks, body)).loads > 0 or len(body) == 1}


def _joined(blocks: list[_Block], body: set[int]) -> _Block:
    return _Block([opcode for index in sorted(body) for opcode in blocks[index].opcodes], [])


def _loop_exits(blocks: list[_Block], body: set[int]) -> list[int]:
    return sorted({s for index in body for s in blocks[index].successors if s not in body})


def _loop_cost(blocks: list[_Block], body: set[int], head: int, loads: int, streams: int) -> _Cost:
    """The costliest iteration, as often as it takes to load a chunk."""
    if any(map(_is_vector_store, _joined(blocks, body).opcodes)):
        loads *= streams
    best: dict[int, dict[tuple[int, int], _Cost]] = {head: {(0, 0): _Cost(0, 0, 0, 0)}}
    iteration = _Cost(0, 0, 0, 0)
    for index in sorted(body):
        for before in list(best.get(index, {}).values()):
            after = before + _cost(blocks[index])
            if head in blocks[index].successors and after.instructions > iteration.instructions:
                iteration = after
            for successor in blocks[index].successors:
                if successor in body and successor > index:
                    _keep_costliest(best.setdefault(successor, {}), after)
    if iteration.loads == 0:
        return iteration
    return iteration.times(loads // iteration.loads)
