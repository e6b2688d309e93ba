"""A disassembled kernel: its instructions, what the compiler tells the scheduler with each, and its loops."""

import re
from dataclasses import dataclass
from functools import cached_property

LABEL = re.compile(r"\s*(\.L_\w+):")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(@!?\w+\s+)?([\w.]+)(.*?);(?:\s*/\* 0x[0-9a-f]+ \*/)?\s*$")
UPPER_HALF = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/\s*$")


@dataclass(frozen=True)
class Control:
    """The scheduling bits of an encoding, from bit 105 on.

    An instruction whose latency is not fixed holds up to two of six scoreboards: one until its result is there, one
    until its operands are read. An instruction waits until nothing holds the scoreboards of its mask.
    """

    stall: int = 1  # cycles until the warp may issue its next instruction
    result: int | None = None
    operands: int | None = None
    waits: tuple[int, ...] = ()

    @classmethod
    def decode(cls, upper_half: int) -> "Control":
        bits = upper_half >> (105 - 64)
        result, operands = ((bits >> shift) & 7 for shift in (5, 8))
        waits = tuple(i for i in range(6) if (bits >> 11 + i) & 1)
        return cls(bits & 15, result if result < 6 else None, operands if operands < 6 else None, waits)


@dataclass
class Instruction:
    """A mnemonic with its suffixes, and where it goes if it is a branch."""

    code: str
    conditional: bool
    label: str | None
    target: int | None = None
    control: Control = Control()

    @property
    def name(self) -> str:
        return self.code.split(".")[0]


@dataclass(frozen=True)
class Loop:
    """A loop of SASS instructions. Its elements are those that one turn of all threads loads, or if none, stores."""

    instructions: int
    load_bits: int  # the widest load from global memory; 0 if there is none
    store_bits: int
    loaded_bytes: int  # per thread and turn
    per_element: float | None


@dataclass(frozen=True)
class Sass:
    """The instructions of one kernel. A loop is the range that a backward branch closes."""

    instructions: list[Instruction]

    @classmethod
    def parse(cls, text: str) -> "Sass":
        """Of what `nvdisasm -c` prints; with `-hex` besides, control codes too."""
        instructions: list[Instruction] = []
        labels = {}
        for line in text.splitlines():
            if label := LABEL.match(line):
                labels[label[1]] = len(instructions)
            elif found := INSTRUCTION.match(line):
                predicate, code, operands = found.groups()
                to = re.search(r"`\((\.L_\w+)\)", operands) if code.split(".")[0] == "BRA" else None
                conditional = bool(predicate or ".DIV" in code or re.match(r"\s*!?U?P\w", operands))
                instructions.append(Instruction(code, conditional, to and to[1]))
            elif encoding := UPPER_HALF.match(line):
                instructions[-1].control = Control.decode(int(encoding[1], 16))
        for instruction in instructions:
            instruction.target = labels.get(instruction.label or "")
        return cls(instructions)

    @cached_property
    def codes(self) -> list[str]:
        return [instruction.code for instruction in self.instructions]

    @cached_property
    def names(self) -> list[str]:
        return [instruction.name for instruction in self.instructions]

    @cached_property
    def ranges(self) -> list[range]:
        return [
            range(x.target, i + 1) for i, x in enumerate(self.instructions) if x.target is not None and x.target <= i
        ]

    @property
    def spills(self) -> int:
        return sum(name in ("STL", "LDL") for name in self.names)

    @property
    def scan_length(self) -> int | None:
        """Instructions in the first loop that reads global memory."""
        return None if self._scan is None else len(self._scan)

    @property
    def scan_vectors(self) -> int:
        """Loads of 16 bytes in that loop."""
        return 0 if self._scan is None else [load_bits(self.codes[i]) for i in self._scan].count(128)

    @property
    def _scan(self) -> range | None:
        return next((loop for loop in self.ranges if "LDG" in self.names[loop.start : loop.stop]), None)

    def loops(self, itemsize: int) -> list[Loop]:
        """A single instruction that jumps to itself is what follows the end of a program."""
        return [self._loop(self.codes[part.start : part.stop], itemsize) for part in self.ranges if len(part) > 1]

    @staticmethod
    def _loop(codes: list[str], itemsize: int) -> Loop:
        loads = [bits for code in codes if (bits := load_bits(code))]
        stores = [moved_bits(code) for code in codes if code.startswith("STG.")]
        elements = sum(loads or stores) / 8 / itemsize
        per_element = round(len(codes) / elements, 3) if elements else None
        return Loop(len(codes), max(loads, default=0), max(stores, default=0), sum(loads) // 8, per_element)


def load_bits(code: str) -> int:
    """That an instruction loads from global memory for a thread; 0 of another."""
    return moved_bits(code) if code.split(".")[0] in ("LDG", "LDGSTS") else 0


def moved_bits(code: str) -> int:
    """That a thread moves with LDG.E.128, LDG.E.U16 and the like; without a width it is a register."""
    widths = [int(suffix.lstrip("US")) for suffix in code.split(".") if re.fullmatch(r"[US]?(8|16|32|64|128)", suffix)]
    return widths[-1] if widths else 32
