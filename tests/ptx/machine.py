"""Runs a kernel: all threads of some blocks at a time, a register an array over them.

Threads that part at a branch are run by the lowest program counter: those behind catch up, and where they
meet they go on together. A barrier has to be met by all threads of a block that have not ended; a shuffle by
all threads of a warp that it names.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptx import instructions
from ptx.memory import UNSIGNED, Fault, GlobalMemory, Interval, Lanes, LocalMemory, SharedMemory
from ptx.program import Function, Instruction, Program, Unknown, call_arguments, callee, size_of

Array = NDArray[Any]
Mask = Array | None  # which lanes; None: all
Execute = Callable[["Frame", Mask], None]

BATCH = 16  # blocks at a time: more would cost less per lane, but no longer fit the caches
GARBAGE = 0xA5  # what registers hold before they are written
SHARED_WINDOW, LOCAL_WINDOW = 1 << 56, 1 << 57  # where they begin among generic addresses


@dataclass(slots=True)
class Step:
    """An instruction, ready to run. `execute` is None where it ends its basic block."""

    instruction: Instruction
    execute: Execute | None
    guard: int | None  # the slot of the guard's register
    negated: bool
    target: int | None = None  # the step that a branch goes to


@dataclass(slots=True)
class Code:
    """A function, decoded. `slots`: the registers that its steps touch, each with the type as which."""

    function: Function
    steps: list[Step]
    ends: dict[int, int]  # first step of a basic block -> its end
    slots: list[tuple[str, str]]
    local_base: int = 0


@dataclass(slots=True)
class Kernel:
    """A program, decoded once for all launches.

    Attributes:
        executed: how many threads have entered each basic block, by function and first step.
    """

    program: Program
    codes: dict[str, Code] = field(default_factory=dict)
    local_size: int = 0
    constants: dict[str, Array] = field(default_factory=dict)
    executed: Counter[tuple[str, int]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        for name, variable in self.program.constants.items():
            data = np.zeros(variable.size + 16, np.uint8)  # room to align it
            start = -data.ctypes.data % 16
            data[start : start + variable.size] = np.frombuffer(variable.data or b"", np.uint8)
            self.constants[name] = data[start : start + variable.size]
        for name, function in self.program.functions.items():
            size = max((v.offset + v.size for v in function.local.values()), default=0)
            base, self.local_size = self.local_size, self.local_size + -(-size // 16) * 16
            self.codes[name] = _decoded(self, function, base)

    @property
    def threads(self) -> int:
        return self.program.kernel.threads

    def static_shared(self) -> int:
        variables = self.program.kernel.shared.values()
        return -(-max((v.offset + v.size for v in variables), default=0) // 16) * 16

    def constant_intervals(self) -> list[Interval]:
        return [Interval(n, c.ctypes.data, c.nbytes, writable=False) for n, c in self.constants.items()]

    def instructions_executed(self) -> Counter[str]:
        """Of all threads in all launches so far, by opcode."""
        total: Counter[str] = Counter()
        for (name, start), threads in self.executed.items():
            code = self.codes[name]
            for step in code.steps[start : code.ends[start]]:
                total[step.instruction.opcode] += threads
        return total

    def never_executed(self) -> list[Instruction]:
        """What no launch so far has come to."""
        seen = {name: set[int]() for name in self.codes}
        for name, start in self.executed:
            seen[name] |= set(range(start, self.codes[name].ends[start]))
        return [
            step.instruction
            for name, code in self.codes.items()
            for i, step in enumerate(code.steps)
            if i not in seen[name]
        ]

    def launch(
        self,
        grid: int,
        params: bytes,
        memory: GlobalMemory,
        dynamic_shared: int = 0,
        threads: int | None = None,
        seed: int | None = None,
    ) -> None:
        """Runs `grid` blocks.

        Args:
            params: the kernel's parameters, as they lie in memory.
            memory: what it may touch; `constant_intervals` has to be among it.
            threads: of a block; None: as many as the kernel says.
            seed: approximations err by all that the ISA allows, up or down by a hash of their arguments and
                this; None: not at all.

        Raises:
            Fault: the program did what no program may.
            Unknown: it has something that this interpreter does not know.
        """
        for first in range(0, grid, BATCH):
            Machine(
                self, grid, first, min(BATCH, grid - first), threads or self.threads, params, memory,
                dynamic_shared, seed,
            ).run()  # fmt: skip


def _decoded(kernel: Kernel, function: Function, local_base: int) -> Code:
    decoder = Decoder(kernel, function, local_base)
    steps = [decoder.step(instruction) for instruction in function.code]
    starts = {0, *function.labels.values()}
    starts |= {i + 1 for i, step in enumerate(steps) if step.execute is None}
    order = [*sorted(start for start in starts if start < len(steps)), len(steps)]
    ends = dict(pairwise(order))
    return Code(function, steps, ends, decoder.slots, local_base)


class Decoder:
    """Turns instructions into steps: operands become functions of the frame, once for all executions."""

    def __init__(self, kernel: Kernel, function: Function, local_base: int) -> None:
        self.kernel = kernel
        self.function = function
        self.slots: list[tuple[str, str]] = []
        self._slot_of: dict[tuple[str, str], int] = {}
        self._addresses = self._symbols(local_base)

    def _symbols(self, local_base: int) -> dict[str, int]:
        program = self.kernel.program
        addresses = {name: data.ctypes.data for name, data in self.kernel.constants.items()}
        addresses |= {name: v.offset for name, v in program.kernel.shared.items()}
        addresses |= {name: local_base + v.offset for name, v in self.function.local.items()}
        if program.dynamic_shared:
            addresses[program.dynamic_shared] = self.kernel.static_shared()
        return addresses

    def step(self, instruction: Instruction) -> Step:
        guard, negated = None, False
        if instruction.guard:
            guard, negated = self.slot(instruction.guard[0], "pred"), instruction.guard[1]
        try:
            base = instruction.opcode.split(".")[0]
            if base == "bra":
                target = self.function.labels[instruction.operands[0]]
                return Step(instruction, None, guard, negated, target)
            if base in ("ret", "exit"):
                return Step(instruction, None, guard, negated)
            execute = self._call(instruction) if base == "call" else instructions.decode(instruction, self)
        except Unknown as error:
            raise Unknown(f"{error}, in {instruction}") from None
        return Step(instruction, execute, guard, negated)

    def _call(self, instruction: Instruction) -> Execute:
        name = callee(instruction)
        returns, arguments = call_arguments(instruction)

        def execute(frame: "Frame", mask: Mask) -> None:
            frame.call(frame.machine.kernel.codes[name], arguments, returns, mask)

        return execute

    # ---- operands

    def slot(self, register: str, kind: str) -> int:
        declared = self.function.registers.get(register)
        if declared is None:
            raise Unknown(f"register {register}")
        if size_of(declared) != size_of(kind) or (declared == "pred") != (kind == "pred"):
            raise Unknown(f"register {register} of type .{declared} as .{kind}")
        key = register, kind
        if key not in self._slot_of:
            self._slot_of[key] = len(self.slots)
            self.slots.append(key)
        return self._slot_of[key]

    def read(self, operand: str, kind: str) -> Callable[["Frame"], Array]:
        """A function of the frame: the operand's value, an array over the lanes, or one number for all."""
        if operand in SPECIAL:
            dtype = instructions.DTYPES[kind]
            return lambda frame: frame.machine.special[operand].astype(dtype, copy=False)
        if kind == "pred" and operand.startswith("!"):
            slot = self.slot(operand[1:], kind)
            return lambda frame: ~frame.views[slot]
        if operand in self.function.registers:
            slot = self.slot(operand, kind)
            return lambda frame: frame.views[slot]
        value = self._constant(operand, kind)
        return lambda frame: value

    def _constant(self, operand: str, kind: str) -> Array:
        dtype = instructions.DTYPES[kind]
        if kind == "pred":
            return np.asarray(bool(int(operand)))
        if operand in self._addresses:
            return np.asarray(self._addresses[operand]).astype(dtype)
        bits = 8 * size_of(kind)
        if operand[:2].lower() in ("0f", "0d"):
            value, width = int(operand[2:], 16), 32 if operand[1].lower() == "f" else 64
            if width != bits:
                raise Unknown(f"constant {operand} as .{kind}")
        else:
            try:
                value = int(operand.rstrip("U"), 0)
            except ValueError:
                raise Unknown(f"operand {operand}") from None
        raw = np.asarray(value & (1 << bits) - 1, UNSIGNED[bits // 8]).reshape(1)
        return raw.view(dtype)[0]

    def address(self, operand: str) -> Callable[["Frame"], Array]:
        """[register + constant], [symbol + constant]: an array of int64 over the lanes, or one number."""
        inside = operand.strip("[] \t").replace(" ", "")
        register, sign, constant = inside, "+", "0"
        for i, c in enumerate(inside):
            if c in "+-" and i:
                register, sign, constant = inside[:i], c, inside[i + 1 :]
                break
        constant = constant.lstrip("+")
        offset = np.int64(int(constant, 0) * (-1 if sign == "-" else 1))
        if register in self._addresses:
            value = np.int64(self._addresses[register]) + offset
            return lambda frame: value
        if register not in self.function.registers:
            raise Unknown(f"address {operand}")
        wide = size_of(self.function.registers[register]) == 8
        read = self.read(register, "s64" if wide else "u32")
        return lambda frame: read(frame).astype(np.int64) + offset

    def write(self, operand: str, kind: str) -> Callable[["Frame", Array, Mask], None]:
        """A function that keeps a value in a register, in the lanes of a mask."""
        if operand == "_":
            return lambda frame, value, mask: None
        slot = self.slot(operand, kind)

        def put(frame: "Frame", value: Array, mask: Mask) -> None:
            view = frame.views[slot]
            if mask is None:
                view[...] = value
            else:
                np.copyto(view, value, where=mask if view.ndim == 1 else mask[:, None])

        return put


SPECIAL = (
    "%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%laneid",
)  # fmt: skip


class Machine:
    """Some blocks of a launch."""

    def __init__(
        self,
        kernel: Kernel,
        grid: int,
        first: int,
        blocks: int,
        threads: int,
        params: bytes,
        memory: GlobalMemory,
        dynamic_shared: int,
        seed: int | None,
    ) -> None:
        if threads % 32:
            raise Unknown(f"a block of {threads} threads: no whole warps")
        self.kernel, self.memory, self.seed = kernel, memory, seed
        self.threads, self.lanes = threads, blocks * threads
        self.row = np.repeat(np.arange(blocks), threads)
        tid = np.tile(np.arange(threads), blocks)
        block = first + self.row
        self._block, self._thread = block.astype(np.int32), (block * threads + tid + 1).astype(np.int32)
        self._epoch = np.zeros(blocks, np.int32)
        self.exited = np.zeros(self.lanes, bool)
        zeros = np.zeros(self.lanes, np.uint32)
        self.special: dict[str, Array] = dict.fromkeys(SPECIAL, zeros) | {
            "%tid.x": tid.astype(np.uint32),
            "%ctaid.x": block.astype(np.uint32),
            "%ntid.x": np.full(self.lanes, threads, np.uint32),
            "%nctaid.x": np.full(self.lanes, grid, np.uint32),
            "%laneid": (tid % 32).astype(np.uint32),
        }
        self.shared = SharedMemory(blocks, kernel.static_shared() + dynamic_shared)
        self.local = LocalMemory(self.lanes, kernel.local_size)
        self._params = np.frombuffer(params, np.uint8)[None, :]

    def run(self) -> None:
        code = self.kernel.codes[self.kernel.program.kernel.name]
        frame = Frame(self, code)
        for param in code.function.params:
            frame.params[param.name] = self._params[:, param.offset : param.offset + param.size]
        with np.errstate(all="ignore"):
            frame.run(None)

    def who(self, lanes: Array | slice) -> Lanes:
        return Lanes(self._thread[lanes], self._block[lanes], self._epoch[self.row[lanes]])

    def barrier(self, mask: Mask) -> None:
        """All threads of a block that have not ended have to be here."""
        if mask is None:
            self._epoch += 1
            return
        here, live = mask.reshape(-1, self.threads), ~self.exited.reshape(-1, self.threads)
        reached = here.any(1)
        if (here != live)[reached].any():
            raise Fault("a barrier that only a part of a block reaches")
        self._epoch[reached] += 1


class Frame:
    """A function at work: its registers, parameters and carry bit."""

    def __init__(self, machine: Machine, code: Code) -> None:
        self.machine = machine
        self._code = code
        self.params: dict[str, Array] = {}
        self.carry = np.zeros(machine.lanes, bool)
        values: dict[str, Array] = {}
        self.views: list[Array] = []
        for register, kind in code.slots:
            if register not in values:
                size = size_of(code.function.registers[register])
                values[register] = np.full(machine.lanes * size, GARBAGE, np.uint8)
            view = values[register].view(instructions.DTYPES[kind])
            self.views.append(view.reshape(machine.lanes, 2) if kind == "f32x2" else view)

    def param(self, name: str, size: int) -> Array:
        """A parameter's bytes, [lanes, size] or the same for all: [1, size]; made where it is new."""
        if name not in self.params:
            self.params[name] = np.full((self.machine.lanes, size), GARBAGE, np.uint8)
        return self.params[name]

    def call(self, code: Code, arguments: list[str], returns: list[str], mask: Mask) -> None:
        frame = Frame(self.machine, code)
        for formal, actual in zip(code.function.params, arguments, strict=True):
            frame.params[formal.name] = self.params[actual]
        for formal, actual in zip(code.function.returns, returns, strict=True):
            frame.params[formal.name] = self.param(actual, formal.size)
        frame.run(mask)

    def run(self, mask: Mask) -> None:
        """From the first instruction until all lanes have returned."""
        code, machine = self._code, self.machine
        executed, name = machine.kernel.executed, code.function.name
        end = len(code.steps)
        is_kernel = code.function is machine.kernel.program.kernel
        counter = np.zeros(machine.lanes, np.int32)
        if mask is not None:
            counter[~mask] = end
        while (at := int(counter.min())) < end:
            here = counter == at
            lanes = int(here.sum())
            executed[name, at] += lanes
            mask = None if lanes == machine.lanes else here
            for i in range(at, code.ends[at]):
                step = code.steps[i]
                active = mask
                if step.guard is not None:
                    chosen = self.views[step.guard]
                    chosen = ~chosen if step.negated else chosen
                    active = chosen if mask is None else chosen & mask
                    if active.all():
                        active = None
                if step.execute is None:
                    where = here if active is None or step.guard is None else active
                    counter[here] = i + 1
                    if step.target is not None:
                        counter[where] = step.target
                    else:
                        counter[where] = end
                        if is_kernel:
                            machine.exited |= where
                    break
                if active is None or step.guard is None or active.any():
                    try:
                        step.execute(self, active)
                    except (Fault, Unknown) as error:
                        raise type(error)(f"{error}, in {name}: {step.instruction}") from None
            else:
                counter[here] = code.ends[at]
