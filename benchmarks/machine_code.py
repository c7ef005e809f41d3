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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from r2_kernels.backends.triton import operators
from r2_kernels.backends.triton.apply_kernel import apply_chunks
from r2_kernels.backends.triton.reduce_kernels import finalize_rows, merge_chunks, reduce_chunks
from r2_kernels.penalties import CHUNK_SIZE, PENALTIES

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STREAMING = ("reduce", "apply", "apply_")
KERNELS = (*STREAMING, "merge", "finalize")
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Source(NamedTuple):
    """A kernel with the types of its arguments and its compile-time arguments."""

    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]


def source(kernel: str, penalty: str, dtype: torch.dtype, is_amd: bool = False) -> Source:
    """What the backend launches for float32 parameters: ``apply`` writes gradients, ``apply_`` adds to them."""
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
    else:
        function, constants = apply_chunks, operators.apply_constants(penalty, dtype, kernel == "apply_", is_amd)
        arguments = {"chunks": "*i32", "segments": "*i64", "destinations": "*i64", **parameters}
        arguments |= {"coefficients": "*fp32", "coefficient_stride": 1, "statistics": "*fp64", "maxima": maxima}
    options = {name: constants[name] for name in ("num_warps", "maxnreg") if name in constants}
    fixed = {name: value for name, value in constants.items() if name not in options}
    fixed |= {name: value for name, value in arguments.items() if not isinstance(value, str)}
    signature = {name: value for name, value in arguments.items() if isinstance(value, str)}
    ordered = {name: signature.get(name, "constexpr") for name in function.arg_names}
    return Source(function, ordered, fixed, options)


def compile_kernel(kernel: str, penalty: str, dtype: torch.dtype, target: str) -> Any:
    """The compiled kernel; its ``asm`` holds every stage, ``metadata`` what was chosen. Triton caches it on disk."""
    gpu = TARGETS[target]
    function, signature, constants, options = source(kernel, penalty, dtype, gpu.backend == "hip")
    return triton.compile(ASTSource(function, signature, constants), target=gpu, options=options)


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
    loops = 2 if kernel == "reduce" and operators.EXTREMES[penalty] else 1
    streams = 2 if kernel == "apply_" else 1
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
        vector_stores=sum(
            re.match("STG.E.128|(global|buffer)_store_dwordx4", opcode) is not None for opcode in opcodes
        ),
        paths=tuple(_paths(blocks, loads * streams, loops, elements)),
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
        if opcode.startswith("BRA"):
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


def _paths(blocks: list[_Block], loads: int, loops: int, elements: int) -> Iterator[Path16]:
    """The costliest way from entry to exit for each number of exponentials, of those that load every entry by vectors.

    A loop that loads k vectors an iteration runs ``loads`` / k times, for a chunk; there are ``loops`` of these, or
    straight code in their place. Paths with others belong to chunks that are not aligned or not full.
    """
    loop_of = _innermost_loops(blocks)
    # Of a reduction that looks twice, the first look comes first: a path around it is that of another chunk, even where
    # it goes through two of the loops that are there for the second, which exclude each other.
    first_look = next((index for index, block in enumerate(blocks) if _cost(block).loads), 0) if loops == 2 else 0
    best: dict[int, dict[tuple[int, int], _Cost]] = {}
    totals: dict[tuple[int, int], _Cost] = {}
    for index, block in enumerate(blocks):  # Jumps go forward, but for those that close a loop.
        arriving = best.setdefault(index, {})
        if index == 0:
            arriving[(0, 0)] = _Cost(0, 0, 0, 0)
        body = loop_of.get(index)
        cost = _cost(block) if body is None else _loop_cost(blocks, body, index, loads)
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
        if path_loads == loads * loops:
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


def _loop_cost(blocks: list[_Block], body: set[int], head: int, loads: int) -> _Cost:
    """The costliest iteration, as often as it takes to load a chunk."""
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
