"""What an optimised program keeps beside its arguments and results, from its text."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

#: Instructions that make no buffer of their own.
VIEWS = frozenset({"parameter", "bitcast", "tuple", "get-tuple-element", "while", "conditional", "call", "after-all"})
#: Moves of what exists into another memory, as it lies.
MOVES = frozenset({"copy-start", "copy-done", "slice-start", "slice-done"})
_JOINED = 'custom_call_target="ConcatBitcast"'
_FORWARD = frozenset({"bitcast", "tuple", "get-tuple-element"})

_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) .*\{$")
_INSTRUCTION = re.compile(
    r"\s+(?P<root>ROOT )?%?(?P<name>[\w.-]+) = (?P<type>.+?) (?P<opcode>[a-z][\w-]*)\((?P<operands>[^)]*)\)"
)
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program: what it makes, how, and from which other lines."""

    name: str
    opcode: str
    sizes: tuple[int, ...]
    operands: tuple[str, ...]
    root: bool


def largest_intermediate(text: str) -> int:
    """Bytes, without padding, of the largest array that a program writes and that is neither argument nor result.

    Unlike the size of the temporaries, this also counts what the compiler keeps in on-chip memory. What happens inside
    a fusion or a kernel is not written anywhere and does not count, nor does what is only moved (`moved`).
    """
    largest = 0
    for entry, instructions in _computations(text):
        results = _results(instructions) if entry else set()
        written = (i for i in instructions if i.opcode not in VIEWS | MOVES and i.name not in results)
        largest = max(largest, *(size for i in written for size in i.sizes), 0)
    return largest


def moved(text: str) -> int:
    """Bytes that a program moves, as they are, between on-chip memory and HBM outside of its kernels.

    A compiler may bring a whole store on chip in front of a small kernel, and back behind it.
    """
    every = (i for _, instructions in _computations(text) for i in instructions)
    return sum(size for i in every if i.opcode in ("copy-done", "slice-done") for size in i.sizes)


def _computations(text: str) -> Iterator[tuple[bool, list[Instruction]]]:
    """Instructions of every computation but the insides of fusions, and whether it is the program itself."""
    fused = set(re.findall(r"calls=%?([\w.-]+)", text))
    name, entry, instructions = "", False, []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name, entry, instructions = head["name"], head["entry"] is not None, []
        elif line == "}" and name not in fused:
            yield entry, instructions
        elif found := _INSTRUCTION.match(line):
            sizes = tuple(_size(array[1], array[2]) for array in _ARRAY.finditer(found["type"]))
            operands = tuple(re.findall(r"%([\w.-]+)", found["operands"]))
            # Slices that were moved one by one are joined where they lie.
            opcode = "bitcast" if _JOINED in line else found["opcode"]
            instructions.append(Instruction(found["name"], opcode, sizes, operands, found["root"] is not None))


def _results(instructions: list[Instruction]) -> set[str]:
    """Names of the instructions whose arrays a program returns."""
    by_name = {instruction.name: instruction for instruction in instructions}
    results: set[str] = set()
    pending = [instruction.name for instruction in instructions if instruction.root]
    while pending:
        name = pending.pop()
        if name not in results:
            results.add(name)
            if by_name[name].opcode in _FORWARD:
                pending.extend(by_name[name].operands)
    return results


def _size(dtype: str, dimensions: str) -> int:
    width = re.search(r"\d+", dtype)
    bits = int(width[0]) if width else 8  # pred
    return math.ceil(math.prod(int(d) for d in dimensions.split(",") if d) * bits / 8)
