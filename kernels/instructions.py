# SPDX-License-Identifier: Apache-2.0
"""What a disassembly (cuobjdump -sass) says of a kernel: its instructions by name; of one that
multiplies, in which order the main loop, the copies and the epilogue come; of a pass over rows,
what an element costs."""

import re
from collections import Counter

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.M)
_ADDRESS = re.compile(
    r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(?:[^;\n]*?\s(?:0x([0-9a-f]+)))?", re.M
)
# Of an epilogue's arithmetic, an element each, or half of one where two are packed.
ARITHMETIC = (
    *("FADD", "FMUL", "FFMA", "FSEL", "FSETP", "FMNMX", "MUFU", "ISETP", "SEL", "IADD3"),
    *("F2FP", "F2F", "LOP3", "PRMT", "IMAD", "VIADD", "FSET", "IMNMX", "VIMNMX", "HADD2"),
)


def instructions(code: str) -> list[tuple[str, str]]:
    """Name with modifiers, and operands, in order of their addresses."""
    return [(name, operands.strip()) for name, operands in _INSTRUCTION.findall(code)]


def count(code: str) -> dict[str, int]:
    """How often each instruction occurs, by its name without modifiers."""
    return dict(Counter(name.split(".")[0] for name, _ in instructions(code)))


def local_accesses(code: str) -> int:
    """Loads and stores of spilled registers."""
    counted = count(code)
    return counted.get("LDL", 0) + counted.get("STL", 0)


def products_in_flight(code: str) -> int:
    """Most groups of warp-group products that the main loop leaves unfinished when it waits, on
    sm_90: with 0 it stands still until each is done."""
    waits = re.findall(r"WARPGROUP\.DEPBAR\.LE\s+gsb0,\s*(0x[0-9a-f]+)", code)
    return max((int(one, 16) for one in waits), default=0)


def loads_beside_epilogue(code: str) -> bool:
    """Whether the innermost loop around the products has the exponentials in it too, and bulk
    tensor loads before them: those of the next tile are then under way."""
    names = {int(at, 16): name for at, name, _ in _ADDRESS.findall(code)}
    last = max((at for at, name in names.items() if "MMA" in name), default=0)
    # Beyond it lie pieces of the loop that are rarely entered, and jump back.
    exit_ = max((at for at, name in names.items() if name == "EXIT"), default=0)
    loops = [
        (int(to, 16), int(at, 16))
        for at, name, to in _ADDRESS.findall(code)
        if name == "BRA" and to and int(to, 16) <= last < int(at, 16) < exit_
    ]
    first, end = max(loops, default=(0, 0))
    inside = [name.split(".")[0] for at, name in sorted(names.items()) if first <= at < end]
    powers = [at for at, name in enumerate(inside) if name == "MUFU"]
    return bool(powers) and "UTMALDG" in inside[: powers[-1]]


def of_row_loop(code: str) -> float:
    """Instructions to an exponential in the loop over the whole steps of a row, which reads 16
    bytes at a time; 0 where there is none. Of such loops the first is the ordinary one."""
    lines: list[tuple[int, str, str]] = []
    lines += [(int(at, 16), name, to) for at, name, to in _ADDRESS.findall(code)]
    for at, name, to in lines:
        if name.split(".")[0] != "BRA" or not to or int(to, 16) >= at:
            continue
        body = [one for where, one, _ in lines if int(to, 16) <= where <= at]
        powers = sum(one == "MUFU.EX2" for one in body)
        if powers and any(one.startswith("LDG.E.128") for one in body):
            return len(body) / powers
    return 0.0
