# SPDX-License-Identifier: Apache-2.0
"""What a compiled program costs one device: memory, FLOPs of matrix products, bytes of HBM, and collectives.

XLA's own `cost_analysis` counts the body of a loop once. Here a loop counts as often as it runs: the optimised program
says how often for every scan and map; of a loop that ends when its data say so (decoding), the caller says it.
"""

import functools
import math
import re
from typing import Any, NamedTuple

import numpy as np

from opd_jax import hlo
from opd_jax.hlo import Computation, Instruction, Program, Shape

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Neither reads nor writes memory itself, or is counted by what it calls or where it started.
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all"}
_FREE |= {"partition-id", "replica-id", "opt-barrier", "domain", "add-dependency", "async-start", "async-update"}
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": -1}  # in place; which operand is what is written
_VIEWS = ("bitcast", "reshape")


class Memory(NamedTuple):
    """Bytes of one device."""

    arguments: int
    output: int
    temporary: int
    aliased: int  # of the output that take the place of donated arguments
    code: int

    @property
    def peak(self) -> int:
        """Most that is in use while the program runs: an aliased output lies where its argument did."""
        return self.arguments + self.output - self.aliased + self.temporary + self.code


class Traffic(NamedTuple):
    """Collectives of one kind, in one run of a program."""

    count: float
    bytes: float  # that a device sends, by the ring algorithm


class Cost(NamedTuple):
    """Of one device, in one run of a program."""

    flops: float  # of matrix products and convolutions; 2 for a multiplication and an addition
    bytes: float  # read from and written to HBM by every operation that is not fused into another
    collectives: dict[str, Traffic]  # by kind, those that occur
    cycles: float = 0.0  # that a TPU's compiler expects of the operations it has an estimate of; else 0

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all its collectives."""
        return float(sum(one.bytes for one in self.collectives.values()))


class _Count(NamedTuple):
    flops: float = 0.0
    bytes: float = 0.0
    sends: dict[Any, tuple[str, float, float]] = {}  # noqa: RUF012  never changed; channel: kind, times, bytes
    cycles: float = 0.0

    def times(self, n: int) -> "_Count":
        sends = {key: (kind, n * count, n * size) for key, (kind, count, size) in self.sends.items()}
        return _Count(n * self.flops, n * self.bytes, sends, n * self.cycles)

    def plus(self, other: "_Count") -> "_Count":
        """Both. One channel is one collective, of which start, continuation and end may each be an instruction."""
        sends = dict(self.sends)
        for key, value in other.sends.items():
            sends[key] = max(sends.get(key, value), value, key=lambda one: one[2])
        return _Count(self.flops + other.flops, self.bytes + other.bytes, sends, self.cycles + other.cycles)


def memory_of(compiled: Any) -> Memory:
    """Memory of a `jax.stages.Compiled` program, as XLA has laid it out."""
    stats = compiled.memory_analysis()
    return Memory(
        stats.argument_size_in_bytes,
        stats.output_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.alias_size_in_bytes,
        stats.generated_code_size_in_bytes,
    )


def cost_of(text: str, trips: int = 1, devices: int = 1) -> Cost:
    """Counts a compiled program, loops as often as they run.

    FLOPs are those of matrix products. Bytes are an upper estimate of HBM traffic: what is fused, sliced or updated in
    place is counted as such, but no cache is assumed. A conditional counts as its dearest branch.

    Cycles are those that a TPU's compiler writes beside an operation when it has made its code: the sum, as if nothing
    ran beside anything else. It writes none for transfers, collectives, gathers, scatters and kernels of Pallas.

    Args:
        text: `compiled.as_text()`; with cycles, what `xla_dump_to` writes as `after_codegen`.
        trips: how often loops run whose number is not in the program; the most tokens of an answer, of a sampler.
        devices: that a collective without groups spans.

    | case | result |
    | --- | --- |
    | a scan in a scan | counts multiply |
    | splash attention (`models.flash`) | products of its blocks, as if there were one segment; bytes as below |
    | another library call (`custom-call`), of Pallas or cuDNN | no FLOPs; its operands' and result's bytes |
    """
    program = hlo.parse(text)
    whole = _Counter(program, trips, devices).total(program.entry, False)
    kinds: dict[str, Traffic] = {}
    for kind, count, size in whole.sends.values():
        old = kinds.get(kind, Traffic(0, 0))
        kinds[kind] = Traffic(old.count + count, old.bytes + size)
    return Cost(whole.flops, whole.bytes, dict(sorted(kinds.items())), whole.cycles)


class _Counter:
    def __init__(self, program: Program, trips: int, devices: int):
        self.program, self.trips, self.devices = program, trips, devices
        self.total = functools.cache(self.total)

    def total(self, name: str, fused: bool) -> _Count:
        """One run of a computation; in a fusion memory is touched at its border only."""
        computation, count = self.program.computations[name], _Count()
        for one in computation.instructions.values():
            own = self.own(computation, one)
            count = count.plus(own._replace(bytes=0.0, cycles=0.0) if fused else own)
        return count

    def own(self, computation: Computation, one: Instruction) -> _Count:
        operands = [computation.instructions[name].shapes for name in one.operands if name in computation.instructions]
        if one.opcode == "while":
            condition, body = one.called("condition"), one.called("body")
            each = self.total(condition, False).plus(self.total(body, False))
            return each.times(self.runs(computation, one))
        if one.opcode == "conditional":
            return max((self.total(name, False) for name in one.branches()), key=lambda c: (c.flops, c.bytes))
        if one.opcode == "fusion":
            callee = one.called("calls")
            size, cycles = self.fusion_bytes(computation, one, callee), _cycles(one)
            return self.total(callee, True)._replace(bytes=size, cycles=cycles)
        if one.opcode in ("call", "async-start"):
            return self.total(one.called("to_apply") or one.called("calls"), False)
        return _Count(_flops(one, operands), _bytes(one, operands), self.sends(one, operands), _cycles(one))

    def sends(self, one: Instruction, operands) -> dict:
        kind = one.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return {}
        given = sum(shape.bytes for shapes in operands for shape in shapes)
        n = _group_size(one.attributes, self.devices)
        share = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}.get(kind, (n - 1) / n)
        channel = re.search(r"channel_id=(\d+)", one.attributes)
        return {channel[1] if channel else one.name: (kind, 1, share * given)}

    def runs(self, around: Computation, loop: Instruction) -> int:
        """How often the body of a loop runs: as XLA says, or as a condition `i < N` and the step of i do."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        condition, body = (self.program.computations[loop.called(kind)] for kind in ("condition", "body"))
        test = condition.instructions[condition.root]
        compared = [condition.instructions[name] for name in test.operands]
        if test.opcode == "fusion":
            inside = self.program.computations[test.called("calls")]
            given = dict(zip((one.name for one in inside.parameters()), compared))
            test = inside.instructions[inside.root]
            compared = [given.get(name, inside.instructions[name]) for name in test.operands]
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return self.trips
        state, (index, bound) = around.instructions[loop.operands[0]], map(_place, compared)
        limit = _constant(condition, compared[1].name)
        if limit is None and compared[1].opcode == "constant":
            limit = int(compared[1].literal)  # inside the fusion
        if limit is None and bound is not None and state.opcode == "tuple":
            limit = _constant(around, state.operands[bound])
        if limit is None or index is None:
            return self.trips
        start = _constant(around, state.operands[index]) if state.opcode == "tuple" else None
        return max(0, math.ceil((limit - (start or 0)) / _step(body, index)))

    def fusion_bytes(self, computation: Computation, one: Instruction, callee: str) -> float:
        inside = self.program.computations[callee]
        total = 0.0
        for name, parameter in zip(one.operands, inside.parameters()):
            shapes = computation.instructions[name].shapes
            if any(shape.hbm for shape in shapes):
                total += min(self.read(callee, parameter.name), sum(shape.bytes for shape in shapes if shape.hbm))
        root = inside.instructions[inside.root]
        parts = [inside.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
        if len(parts) != len(one.shapes):
            return total + _hbm(one.shapes)
        return total + sum(_written(inside, part, shape) for part, shape in zip(parts, one.shapes))

    def read(self, callee: str, name: str) -> float:
        """Bytes of a parameter that a fused computation reads: slices of it, or all."""
        inside, total = self.program.computations[callee], 0.0
        whole = float(sum(shape.bytes for shape in inside.instructions[name].shapes))
        for user in inside.users(name):
            if user.opcode in _SLICES and user.operands[0] == name:
                total += sum(shape.bytes for shape in user.shapes)
            elif user.opcode in _VIEWS:
                total += self.read(callee, user.name)
            elif user.opcode == "fusion":
                parameters = self.program.computations[nested := user.called("calls")].parameters()
                used = [p.name for p, given in zip(parameters, user.operands) if given == name]
                total += sum(self.read(nested, parameter) for parameter in used)
            elif not (user.opcode == "tuple" or (user.opcode in _UPDATES and user.operands[0] == name)):
                total += whole
        return min(total, whole)


def _place(one: Instruction) -> int | None:
    """Which element of a tuple this takes."""
    return int(re.search(r"index=(\d+)", one.attributes)[1]) if one.opcode == "get-tuple-element" else None


def _constant(inside: Computation, name: str) -> int | None:
    """The number that an instruction is, if it is one, or a copy of one."""
    one = inside.instructions.get(name)
    while one is not None and one.opcode in ("copy", "bitcast"):
        one = inside.instructions.get(one.operands[0])
    return int(one.literal) if one is not None and one.opcode == "constant" and one.literal.isdigit() else None


def _step(body: Computation, index: int) -> int:
    """By how much a loop's body raises its counter: a loop over the parts of a collective can take two at a time."""
    root = body.instructions[body.root]
    raised = body.instructions[root.operands[index]] if root.opcode == "tuple" else root
    found = [_constant(body, name) for name in raised.operands] if raised.opcode == "add" else []
    return next(filter(None, found), 1)


def _hbm(shapes) -> float:
    return float(sum(shape.bytes for shape in shapes if shape.hbm))


def _written(inside: Computation, part: Instruction, shape: Shape) -> float:
    """Bytes that a fusion writes for one of its results; nothing where it hands on what it was given."""
    while part.opcode in _VIEWS:
        part = inside.instructions[part.operands[0]]
    if part.opcode in _UPDATES:
        what = inside.instructions[part.operands[_UPDATES[part.opcode]]]
        return _hbm([what.shapes[0]._replace(hbm=shape.hbm)])
    return 0.0 if part.opcode == "parameter" else _hbm([shape])


def _cycles(one: Instruction) -> float:
    """Nothing, too, where the compiler has written the greatest number there is."""
    found = re.search(r'"estimated_cycles":"(\d+)"', one.attributes)
    return float(found[1]) if found and int(found[1]) < 2**62 else 0.0


def _bytes(one: Instruction, operands) -> float:
    if one.opcode in _FREE or one.opcode.endswith("-done"):
        return 0.0
    if one.opcode in _SLICES:
        size = float(one.shapes[0].bytes)
        return size * (any(shape.hbm for shape in operands[0]) + one.shapes[0].hbm)
    if one.opcode in _UPDATES:
        return 2 * _hbm(operands[_UPDATES[one.opcode]])
    result = one.shapes[:1] if one.opcode.endswith("-start") else one.shapes
    return _hbm(result) + sum(map(_hbm, operands))


def _flops(one: Instruction, operands) -> float:
    if one.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
        dims = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
        return 2.0 * one.shapes[0].elements * math.prod(operands[0][0].dims[axis] for axis in dims)
    if one.opcode == "ragged-dot":
        return 2.0 * one.shapes[0].elements * operands[0][0].dims[-1]
    if one.opcode == "convolution":
        return _convolution_flops(one, operands[0][0].dims, operands[1][0].dims)
    if one.opcode == "custom-call" and (kernel := re.match(r"splash_mha_(fwd|dq|dkv)_", one.name)):
        return _splash_flops(kernel[1], [shape for shapes in operands for shape in shapes])
    return 0.0


def _splash_flops(kernel: str, operands: list[Shape]) -> float:
    """Products of all queries with all keys, in blocks; of n blocks of queries a causal mask leaves (n + 1) / 2n."""
    queries = max((shape for shape in operands if shape.dtype in ("bf16", "f32")), key=lambda shape: shape.elements)
    # int32 are two arrays of segments, if any, and the places of queries, by which alone it knows what is causal
    causal = sum(shape.dtype == "s32" for shape in operands) % 2
    blocks = next(shape.dims[-1] for shape in operands if shape.dtype == "s8")
    share = (blocks + 1) / (2 * blocks) if causal else 1.0
    return 2.0 * {"fwd": 2, "dq": 3, "dkv": 4}[kernel] * queries.elements * queries.dims[-2] * share


def _convolution_flops(one: Instruction, image: tuple[int, ...], kernel: tuple[int, ...]) -> float:
    """As XLA counts: without the multiplications by the zeros of padding and dilation, which batches are made of."""
    of_image, of_kernel, of_result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes).groups()
    window = dict(re.findall(r"(size|stride|pad|lhs_dilate|rhs_dilate)=([\dx_\-]+)", one.attributes))
    groups = {name: int(n) for name, n in re.findall(r"(feature|batch)_group_count=(\d+)", one.attributes)}
    pairs = 1
    for axis in filter(str.isdigit, of_result):
        setting = lambda name, axis=axis: int(window[name].split("x")[int(axis)]) if name in window else 1
        low = int(window["pad"].split("x")[int(axis)].split("_")[0]) if "pad" in window else 0
        sizes = image[of_image.index(axis)], kernel[of_kernel.index(axis)], one.shapes[0].dims[of_result.index(axis)]
        pairs *= _pairs(*sizes, setting("stride"), low, setting("lhs_dilate"), setting("rhs_dilate"))
    features = image[of_image.index("f")] // groups.get("feature", 1) * kernel[of_kernel.index("o")]
    return 2.0 * features * (image[of_image.index("b")] // groups.get("batch", 1)) * pairs


@functools.cache
def _pairs(size: int, kernel: int, result: int, stride: int, low: int, dilate: int, spread: int) -> int:
    """Positions of result and kernel along one axis that meet an element of the image."""
    place = (np.arange(result) * stride - low)[:, None] + np.arange(kernel)[None] * spread
    return int(((place % dilate == 0) & (place >= 0) & (place // dilate < size)).sum())


def _group_size(attributes: str, devices: int) -> int:
    """How many devices take part in one group of a collective."""
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'([^']+)'", match[2])) or devices
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return match[1].count(",") + 1
    return devices
