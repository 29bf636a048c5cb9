"""What a compiled program does, counted from its HLO text."""

import re

import numpy as np

SIZES = {"f64": 8, "s64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2,
         "s8": 1, "u8": 1, "pred": 1}  # fmt: skip
SHAPE = re.compile(rf"\b({'|'.join(SIZES)})\[([\d,]*)\](\{{[^}}]*\}})?")
# The memory space of a TPU's fast memory, into which arrays are prefetched.
FAST = re.compile(r"S\([1-9]")
COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?$"
)
# Instructions that do not become separate kernels.
NO_KERNEL = {
    "parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all",
    "partition-id", "iota", "conditional",
}  # fmt: skip


def arrays_of(shape):
    """Returns (bytes, whether it is in main memory) for each array of a shape."""
    return [
        (
            SIZES[kind]
            * int(np.prod([int(n) for n in dims.split(",") if n], initial=1)),
            not FAST.search(layout),
        )
        for kind, dims, layout in SHAPE.findall(shape)
    ]


def bytes_of(shape):
    """Returns how many bytes of main memory an array, or a tuple of arrays, takes."""
    return sum(size for size, main in arrays_of(shape) if main)


def copied(shape):
    """Returns the bytes of main memory that a copy reads and writes."""
    source, result = arrays_of(shape)[:2]
    return min(source[0], result[0]) * (source[1] + result[1])


def computations(text):
    """Returns the instructions of each computation: (name, shape, op, the rest)."""
    found, name = {}, None
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.-]+) .*\{$", line)
        if head:
            name = "ENTRY" if head[1] else head[2]
            found[name] = []
        elif name:
            made = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*)$", line)
            found[name] += [made.groups()] if made else []
    return found


def collectives(instructions):
    """Returns the kind and shape of each collective; a start/done pair counts once."""
    pairs = ((COLLECTIVE.match(op), shape) for _, shape, op, _ in instructions)
    return [(found[1], shape) for found, shape in pairs if found]


def written_in_place(called):
    """Returns the bytes that a fusion writes in place into an operand, or None."""
    if not called or called[-1][2] != "dynamic-update-slice":
        return None
    shapes = {name: shape for name, shape, _, _ in called}
    update = re.findall(r"%([\w.-]+)", called[-1][3].split(")")[0])[1]
    return sum(size for size, _ in arrays_of(shapes[update]))


def kernels(program, name="ENTRY"):
    """Returns how many kernels a computation has, and the bytes they read and write.

    Bytes are those of main memory. A copy to fast memory that overlaps with the kernels
    is not a kernel, but the bytes that it reads count. For an array that is updated in
    place, only what is written counts.
    """
    instructions = program[name]
    sizes, count, moved = {}, 0, 0
    for name, shape, op, rest in instructions:
        sizes[name] = bytes_of(shape)
        sent = COLLECTIVE.match(op.removesuffix("-done"))
        if op in ("copy-start", "slice-start"):
            moved += copied(shape)
        if op in NO_KERNEL or sent or op.endswith(("-start", "-done")):
            continue
        operands = [o.strip() for o in rest.split(")")[0].split(",")]
        names = [re.search(r"([\w.-]*)$", o)[1] for o in operands]
        count += 1
        read, wrote = [sizes.get(n, 0) for n in names], sizes[name]
        called = re.search(r"calls=%?([\w.-]+)", rest)
        in_place = written_in_place(program.get(called[1], []) if called else [])
        if in_place is not None and wrote:
            if wrote in read:
                read.remove(wrote)
            wrote = in_place
        moved += wrote + sum(read)
    return count, moved
