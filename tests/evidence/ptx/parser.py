"""PTX text to a structured module: entries, variables, instructions. Knows no semantics."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from .errors import PtxError


@dataclass(frozen=True)
class Instruction:
    """``@guard opcode operands;`` with the opcode split at its dots."""

    opcode: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None
    negated: bool
    line: int
    text: str

    @property
    def name(self) -> str:
        return ".".join(self.opcode)


@dataclass(frozen=True)
class Variable:
    """A declared array in a state space; ``data`` holds its initial bytes, if any."""

    name: str
    space: str
    align: int
    size: int
    data: bytes | None = None
    external: bool = False


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str
    offset: int
    size: int


@dataclass
class Entry:
    """A kernel: parameters, register widths in bits (1 for predicates), variables, code."""

    name: str
    parameters: list[Parameter]
    registers: dict[str, int] = field(default_factory=dict)
    families: dict[str, int] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    targets: dict[str, list[str]] = field(default_factory=dict)
    required_threads: tuple[int, int, int] | None = None
    max_threads: int = 1024

    def width(self, register: str) -> int | None:
        """Bits of a register, or None if it is not one of this entry."""
        found = self.registers.get(register)
        if found is None:
            stem = register.rstrip("0123456789")
            found = self.families.get(stem) if stem != register else None
        return found


@dataclass
class ParsedModule:
    entries: dict[str, Entry]
    variables: list[Variable]
    target: str


_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}
_DIRECTIVES = (
    ".loc", ".file", ".pragma", ".section", ".version", ".target", ".address_size", ".maxntid",
    ".reqntid", ".minnctapersm", ".maxnreg", ".weak", ".explicitcluster", ".reqnctapercluster",
)  # fmt: skip
_VARIABLE = re.compile(
    r"(?P<extern>\.extern\s+|\.visible\s+|\.weak\s+)?\.(?P<space>shared|global|const|local)\s+"
    r"(?:\.align\s+(?P<align>\d+)\s+)?(?:\.attribute\([^)]*\)\s*)?\.(?P<type>\w+)\s+"
    r"(?P<name>[\w$]+)(?P<dims>(?:\[\d*\])*)\s*(?:=\s*(?P<data>.*))?$",
    re.S,
)


def type_bytes(name: str) -> int:
    """Bytes of a PTX type name such as ``u32``, ``bf16`` or ``f16x2``."""
    if name.endswith("x2"):
        return 2 * type_bytes(name[:-2])
    digits = re.sub(r"^\D+", "", name)
    if digits not in _SIZES:
        raise PtxError(f"unknown type .{name}")
    return _SIZES[digits]


def parse(text: str) -> ParsedModule:
    """Parse a PTX module. Functions other than entries are skipped."""
    text = re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m.group()), text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    target = re.search(r"\.target\s+([\w, ]+)", text)
    module = ParsedModule({}, [], target.group(1).strip() if target else "")
    position = 0
    header = re.compile(r"(?:\.(?:visible|weak|extern)\s+)*\.(entry|func)\b")
    while True:
        found = header.search(text, position)
        _globals(text, position, found.start() if found else len(text), module)
        if not found:
            return module
        brace, semicolon = text.find("{", found.end()), text.find(";", found.end())
        if brace < 0 or 0 <= semicolon < brace:  # a declaration
            position = semicolon + 1
            continue
        end = _closing(text, brace)
        if found.group(1) == "entry":
            entry = _entry(text, found.end(), brace, end)
            module.entries[entry.name] = entry
        position = end + 1


def _closing(text: str, start: int) -> int:
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.start()
    raise PtxError("unbalanced braces")


def _globals(text: str, start: int, end: int, module: ParsedModule) -> None:
    section = re.compile(r"\.section\s+[\w.]+\s*\{[^}]*\}", re.S)
    for statement in section.sub("", text[start:end]).split(";"):
        at = re.search(r"(\.(extern|visible|weak)\s+)?\.(shared|global|const)\s", statement)
        if at:
            module.variables.append(_variable(statement[at.start() :].strip()))


def _variable(statement: str) -> Variable:
    match = _VARIABLE.match(statement)
    if not match:
        raise PtxError(f"variable not understood: {statement[:80]!r}")
    each = type_bytes(match["type"])
    dims = re.findall(r"\[(\d*)\]", match["dims"])
    count = 1
    for dim in dims:
        count *= int(dim or 0)
    data = _initial(match["data"], match["type"], each * count) if match["data"] else None
    external = (match["extern"] or "").strip() == ".extern" or "" in dims
    align = int(match["align"] or each)
    return Variable(match["name"], match["space"], align, each * count, data, external)


def _initial(source: str, type_name: str, size: int) -> bytes:
    each = type_bytes(type_name)
    raw = bytearray()
    for item in re.findall(r"[^\s{},]+", source):
        if item.startswith(("0f", "0F", "0d", "0D")):
            raw += int(item[2:], 16).to_bytes(each, "little")
        elif re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", item):
            value = int(item.rstrip("U"), 0) if not item.isdigit() else int(item)
            raw += (value % (1 << 8 * each)).to_bytes(each, "little")
        else:
            raise PtxError(f"initialiser {item!r} is not supported")
    return bytes(raw).ljust(size, b"\0")


def _entry(text: str, start: int, brace: int, end: int) -> Entry:
    head = text[start:brace]
    match = re.match(r"\s*([\w$]+)\s*(?:\((.*?)\))?(.*)", head, re.S)
    if not match:
        raise PtxError(f"entry not understood: {head[:80]!r}")
    entry = Entry(match.group(1), _parameters(match.group(2) or ""))
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", head)
    if threads and ".reqntid" in head:
        x, y, z = (int(part or 1) for part in threads.groups())
        entry.required_threads = (x, y, z)
    elif threads:
        entry.max_threads = math.prod(int(part or 1) for part in threads.groups())
    line = text.count("\n", 0, brace) + 1
    _body(text[brace + 1 : end], line, entry)
    return entry


def _parameters(source: str) -> list[Parameter]:
    result: list[Parameter] = []
    offset = 0
    for item in filter(None, (part.strip() for part in source.split(","))):
        match = re.match(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(.*)$", item, re.S)
        name = re.search(r"([\w$]+)\s*(?:\[(\d+)\])?\s*$", item)
        if not match or not name:
            raise PtxError(f"parameter not understood: {item!r}")
        each = type_bytes(match.group(2))
        align = max(each, int(match.group(1) or 1))
        size = each * int(name.group(2) or 1)
        offset = -(-offset // align) * align
        result.append(Parameter(name.group(1), match.group(2), offset, size))
        offset += size
    return result


_STATEMENT = re.compile(
    r"""\s*(?:
      (?P<brace>[{}])
    | (?P<label>\$?[A-Za-z_%$][\w$]*)\s*:(?!:)
    | (?P<line>\.(?:loc|file)\b[^\n;]*)
    | (?P<branch>\.branchtargets[^;]*;)
    | (?P<reg>\.reg\b[^;]*;)
    | (?P<variable>\.(?:shared|local|global|const)\b[^;]*;)
    | (?P<pragma>\.(?:pragma|callprototype|calltargets|param)\b[^;]*;)
    | (?P<code>[^;]*;)
    )""",
    re.X,
)


def _statements(body: str) -> Iterator[tuple[str, str, int]]:
    position = 0
    stripped = len(body.rstrip())
    while position < stripped:
        match = _STATEMENT.match(body, position)
        if not match:
            raise PtxError(f"statement not understood: {body[position : position + 60].strip()!r}")
        kind = str(match.lastgroup)
        yield kind, match.group(kind), match.start(kind)
        position = match.end()


def _body(body: str, first_line: int, entry: Entry) -> None:
    """Fill registers, variables, labels and instructions; inner ``{ .reg }`` scopes are renamed."""
    scopes: list[dict[str, str]] = [{}]
    count = 0
    last_label = ""
    line, seen = first_line, 0
    for kind, text, start in _statements(body):
        line += body.count("\n", seen, start)
        seen = start
        if kind == "brace":
            if text == "{":
                scopes.append({})
                count += 1
            else:
                scopes.pop()
        elif kind == "label":
            last_label = _rename(text, scopes)
            entry.labels[last_label] = len(entry.instructions)
        elif kind == "branch":
            names = re.findall(r"[\w$]+", text[len(".branchtargets") :])
            entry.targets[last_label] = names
        elif kind == "reg":
            _registers(text, entry, scopes, count)
        elif kind == "variable":
            entry.variables.append(_variable(text[:-1].strip()))
        elif kind == "code":
            entry.instructions.append(_instruction(_rename(text[:-1], scopes), line))


def _rename(text: str, scopes: list[dict[str, str]]) -> str:
    names: dict[str, str] = {}
    for scope in scopes[1:]:
        names.update(scope)
    if not names:
        return text
    return re.sub(r"%?[A-Za-z_$][\w$]*", lambda m: names.get(m.group(), m.group()), text)


def _registers(text: str, entry: Entry, scopes: list[dict[str, str]], scope_id: int) -> None:
    match = re.match(r"\.reg\s+(?:\.v\d\s+)?\.(\w+)\s+(.*);", text, re.S)
    if not match:
        raise PtxError(f"register declaration not understood: {text!r}")
    bits = 1 if match.group(1) == "pred" else 8 * type_bytes(match.group(1))
    for name, family in re.findall(r"([%\w$]+)\s*(?:<(\d+)>)?", match.group(2)):
        if len(scopes) == 1:
            if family:
                entry.families[name] = bits
            else:
                entry.registers[name] = bits
            continue
        for real in [f"{name}{i}" for i in range(int(family))] if family else [name]:
            renamed = f"{real}.s{scope_id}"
            scopes[-1][real] = renamed
            entry.registers[renamed] = bits


_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s](?:[^,{\[]*[^,{\[\s])?")


def _instruction(text: str, line: int) -> Instruction:
    text = " ".join(text.split())
    match = re.match(r"(?:@(!?)\s*([%\w$.]+)\s+)?([a-z][\w.:]*)\s*(.*)$", text)
    if not match:
        raise PtxError(f"line {line}: instruction not understood: {text!r}")
    negated, guard, opcode, rest = match.groups()
    operands = tuple(item.strip() for item in _OPERAND.findall(rest))
    return Instruction(tuple(opcode.split(".")), operands, guard, negated == "!", line, text)
