"""PTX text as functions of instructions.

Written from the PTX ISA's chapters on syntax, state spaces and directives, for what LLVM and nvcc emit.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


class Unknown(NotImplementedError):
    """Something that this interpreter does not know."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: with all its modifiers, as "ld.global.v4.b32".
        operands: as they are written, registers of an inner scope renamed.
        guard: the predicate that it depends on, and whether it must be false; None: it is always executed.
        line: of the PTX.
        source: "file:line" that it was compiled from; empty where that is not known.
    """

    opcode: str
    operands: tuple[str, ...]
    guard: tuple[str, bool] | None
    line: int
    source: str

    def __str__(self) -> str:
        guard = "" if self.guard is None else f"@{'!' * self.guard[1]}{self.guard[0]} "
        where = f", from {self.source}" if self.source else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)} (line {self.line}{where})"


@dataclass(slots=True)
class Variable:
    """One of a state space: `offset` and `size` in bytes. `data`: what it holds before anything runs."""

    name: str
    offset: int
    size: int
    data: bytes | None = None


@dataclass(slots=True)
class Function:
    """A kernel, or a function that a kernel calls.

    Attributes:
        params: its parameters in their order; of a function, those that it returns are among `returns`.
        registers: the type of each, without its dot. Of a range %r<5> all are there.
        shared, local: variables declared in it, with their offsets.
        labels: the index of the instruction that each stands before.
        threads: of a block, as .reqntid or .maxntid says; 0 where neither is there.
    """

    name: str
    params: list[Variable] = field(default_factory=list)
    returns: list[Variable] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, Variable] = field(default_factory=dict)
    local: dict[str, Variable] = field(default_factory=dict)
    threads: int = 0


@dataclass(slots=True)
class Program:
    """A kernel with what it refers to.

    Attributes:
        functions: the kernel's own under its name, and those that it may call.
        constants: global variables with their data.
        dynamic_shared: the name under which shared memory whose size the launch gives is known.
    """

    kernel: Function
    functions: dict[str, Function]
    constants: dict[str, Variable]
    dynamic_shared: str | None


BYTES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}


def size_of(kind: str) -> int:
    """Bytes of a fundamental type, as "f32" or "b64"."""
    match = re.fullmatch(r"[busf](8|16|32|64|128)|bf16|pred|[bf]{1,2}16x2|f32x2", kind)
    if match is None:
        raise Unknown(f"type .{kind}")
    if match.group(1):
        return BYTES[match.group(1)]
    return {"bf16": 2, "pred": 1, "f32x2": 8}.get(kind, 4)


def kernels(text: str) -> list[str]:
    """The names of all kernels in a module."""
    return re.findall(r"\.entry\s+([\w$]+)", text)


def parse(text: str, kernel: str | None = None) -> Program:
    """The kernel of that name, or the only one, and what it needs."""
    text = _without_comments(text)
    names = kernels(text)
    if kernel is None:
        if len(names) != 1:
            raise ValueError(f"{len(names)} kernels: say which")
        (kernel,) = names
    files = dict(re.findall(r"^\s*\.file\s+(\d+)\s+\"[^\"]*?([^\"/]*)\"", text, re.M))
    found = _function(text, kernel, files)
    functions = {kernel: found}
    waiting = [found]
    while waiting:
        for instruction in waiting.pop().code:
            if instruction.opcode.startswith("call"):
                name = callee(instruction)
                if name not in functions:
                    functions[name] = _function(text, name, files)
                    waiting.append(functions[name])
    dynamic = re.search(r"\.extern\s+\.shared\s+(?:\.align\s+\d+\s+)?\.\w+\s+([\w$]+)\s*\[\s*\]", text)
    return Program(found, functions, _constants(text), dynamic.group(1) if dynamic else None)


def callee(call: Instruction) -> str:
    """The function that it calls, by name."""
    names = [operand for operand in call.operands if not operand.startswith("(")]
    if len(names) != 1 or names[0].startswith("%"):
        raise Unknown(str(call))
    return names[0]


def call_arguments(call: Instruction) -> tuple[list[str], list[str]]:
    """What it returns into and what it passes, by name."""
    groups = [
        [name.strip() for name in operand.strip("()").split(",") if name.strip()]
        for operand in call.operands
        if operand.startswith("(")
    ]
    returns_first = call.operands[0].startswith("(")
    if not returns_first:
        groups.insert(0, [])
    return groups[0], groups[1] if len(groups) > 1 else []


# ---- the text


def _without_comments(text: str) -> str:
    """As long as before, line by line."""
    text = re.sub(r"/\*.*?\*/", lambda match: "\n" * match.group().count("\n"), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def _constants(text: str) -> dict[str, Variable]:
    found = {}
    pattern = r"\.(?:global|const)\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+([\w$]+)\s*\[(\d+)\]\s*=\s*\{([^}]*)\}"
    for kind, name, _, values in re.findall(pattern, text):
        size = size_of(kind)
        data = b"".join(int(v, 0).to_bytes(size, "little", signed=int(v, 0) < 0) for v in values.split(","))
        found[name] = Variable(name, 0, len(data), data)
    return found


def _function(text: str, name: str, files: dict[str, str]) -> Function:
    header = re.compile(
        r"\.(?:entry|func)\s*(\([^)]*\))?\s*" + re.escape(name) + r"\s*\(([^)]*)\)([^;{]*)\{", re.S
    )
    match = header.search(text)
    if match is None:
        raise Unknown(f"function {name}")
    returns, params, attributes = match.groups()
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", attributes)
    function = Function(name, _params(params), _params((returns or "").strip("()")))
    function.threads = int(threads.group(1)) if threads else 0
    first_line = text.count("\n", 0, match.end()) + 1
    _Body(function, files).read(_body(text, match.end()), first_line)
    return function


def _params(text: str) -> list[Variable]:
    found, offset = [], 0
    for declaration in filter(None, (part.strip() for part in text.split(","))):
        match = re.search(r"\.([busf]\d+|f16x2)\b.*?([\w$]+)\s*(?:\[(\d+)\])?$", declaration, re.S)
        if match is None:
            raise Unknown(declaration)
        kind, name, length = match.groups()
        size = size_of(kind) * int(length or 1)
        align = re.search(r"\.align\s+(\d+)\s+\.b8", declaration)  # of a structure
        alignment = int(align.group(1)) if align else size_of(kind)
        offset = -(-offset // alignment) * alignment
        found.append(Variable(name, offset, size))
        offset += size
    return found


def _body(text: str, start: int) -> str:
    depth, end = 1, start
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match.group() == "{" else -1
        end = match.start()
        if depth == 0:
            return text[start:end]
    raise Unknown("a body without an end")


class _Body:
    """Reads a function's body, statement after statement."""

    def __init__(self, function: Function, files: dict[str, str]) -> None:
        self._function = function
        self._files = files
        self._scopes: list[dict[str, str]] = [{}]  # of each open scope: a register's name there -> here
        self._source = ""
        self._shared_bytes = self._local_bytes = 0

    def read(self, text: str, line: int) -> None:
        for statement, at in _statements(text, line):
            if statement == "{":
                self._scopes.append({})
            elif statement == "}":
                self._scopes.pop()
            elif statement.endswith(":"):
                self._function.labels[statement[:-1]] = len(self._function.code)
            elif statement.startswith("."):
                self._directive(statement)
            else:
                self._instruction(statement, at)

    def _directive(self, statement: str) -> None:
        name = statement.split(None, 1)[0]
        if name == ".reg":
            self._registers(statement)
        elif name == ".loc":
            file, line = statement.split()[1:3]
            if line != "0":  # 0: no line in particular
                self._source = f"{self._files.get(file, file)}:{line}"
        elif name in (".shared", ".local"):
            self._variable(statement, name)
        elif name == ".param":
            pass  # of a call: `Frame.param` makes it when it is first used
        elif name != ".pragma":
            raise Unknown(statement)

    def _registers(self, statement: str) -> None:
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S).groups()  # type: ignore[union-attr]
        size_of(kind)
        for name in (part.strip() for part in names.split(",")):
            ranged = re.fullmatch(r"(.*?)<(\d+)>", name)
            if ranged:
                each = [f"{ranged.group(1)}{i}" for i in range(int(ranged.group(2)))]
            elif len(self._scopes) > 1:
                each = [f"{name}#{len(self._function.registers)}"]
                self._scopes[-1][name] = each[0]
            else:
                each = [name]
            self._function.registers |= dict.fromkeys(each, kind)

    def _variable(self, statement: str, space: str) -> None:
        match = re.fullmatch(r"\.\w+\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*(?:\[(\d+)\])?", statement)
        if match is None:
            raise Unknown(statement)
        align, kind, name, length = match.groups()
        size, align = size_of(kind) * int(length or 1), int(align or size_of(kind))
        table = self._function.shared if space == ".shared" else self._function.local
        used = max((v.offset + v.size for v in table.values()), default=0)
        table[name] = Variable(name, -(-used // align) * align, size)

    def _instruction(self, statement: str, line: int) -> None:
        guard = None
        match = re.match(r"@(!?)([%\w]+)\s+(.*)", statement, re.S)
        if match:
            guard, statement = (self._name(match.group(2)), match.group(1) == "!"), match.group(3)
        opcode, _, rest = statement.partition(" ") if " " in statement else (statement, "", "")
        operands = tuple(self._renamed(operand) for operand in _operands(rest))
        self._function.code.append(Instruction(opcode, operands, guard, line, self._source))

    def _name(self, name: str) -> str:
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        return name

    def _renamed(self, operand: str) -> str:
        if len(self._scopes) == 1:
            return operand
        return re.sub(r"(?<![%\w$.])%?[A-Za-z_]\w*", lambda match: self._name(match.group()), operand)


def _statements(text: str, line: int) -> Iterator[tuple[str, int]]:
    """Each statement with its line: instructions and directives without their semicolon and with single
    spaces, labels with their colon, and the braces of scopes."""
    at = 0
    pattern = re.compile(
        r"\s*(?:([{}])|([$\w]+:)(?!:)|(\.(?:loc|file)\b[^\n]*)|([^;{}]*(?:\{[^}]*\}[^;{}]*)*);)"
    )
    while text[at:].strip():
        match = pattern.match(text, at)
        if match is None:
            raise Unknown(text[at : at + 80].strip())
        brace, label, directive, statement = match.groups()
        start = match.start(match.lastindex or 0)
        line += text.count("\n", at, start)
        yield brace or label or " ".join((directive or statement).split()), line
        line += text.count("\n", start, match.end())
        at = match.end()


def _operands(text: str) -> Iterator[str]:
    """Split at the commas outside of brackets."""
    depth, start = 0, 0
    for i, c in enumerate(text):
        if c in "{[(":
            depth += 1
        elif c in "}])":
            depth -= 1
        elif c == "," and depth == 0:
            yield text[start:i].strip()
            start = i + 1
    if text[start:].strip():
        yield text[start:].strip()
