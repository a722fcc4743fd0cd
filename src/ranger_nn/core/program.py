"""The program that a plan is lowered to: a flat list of instructions over numbered slots.

A slot holds one tensor (or the state of an aggregator). Everything that depends on shapes only, which boxes are
read, which slots are freed, is decided when the program is made; running it is a loop that calls kernels.

    reads = ( ((slot, cuts), (slot, cuts), ...) , dim )    parts joined along dim, each narrowed by its cuts
    cuts  = ( (dim, start, length), ... )

Enter at `Instruction`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ranger_nn.core.reach import Box

Cut = tuple[int, int, int]
Part = tuple[int, tuple[Cut, ...]]

RUN, VJP, LIFT, MERGE, FINISH, REDUCE_VJP = "run", "vjp", "lift", "merge", "finish", "reduce_vjp"
ALLOC, WRITE, TRIM, ADD, ZEROS = "alloc", "write", "trim", "add", "zeros"
BEGIN, STEP = "begin", "step"
"""Windows of a sweep as they are before its first step, and one step of a rolled plan: see `execute/files/steps.py`."""


@dataclass(frozen=True, slots=True)
class Read:
    """A region of a value, put together from parts of slots along `dim`; `loaded`: it comes from a file."""

    parts: tuple[Part, ...]
    dim: int = 0
    nbytes: int = 0
    box: Box = ()
    loaded: bool = False


@dataclass(frozen=True, slots=True)
class Extent:
    """What one call of a kernel spans: the region of its output, its inputs and their sizes in bytes.

    `reads` tell where each input comes from (in backward the output's gradient is the last); `in_bytes` are sizes of
    the regions, also of those that backward does not read; `wanted` the inputs whose gradient is asked for.
    """

    out_box: Box
    out_bytes: int
    in_bytes: tuple[int, ...]
    reads: tuple[Read, ...]
    wanted: tuple[bool, ...] = ()


@dataclass(slots=True)
class Instruction:
    """One step: `op` on `reads`, results into the slots `outs`, then the slots in `frees` are dropped.

    `node` indexes the graph's nodes (-1: none). `out_box` is the region of the node's output that is computed;
    `wanted` (VJP) says for which inputs a gradient is asked; `shape`/`value` serve ALLOC and ZEROS.
    `live` is the projected number of bytes while it runs, workspace included; `grows` what the step itself adds.
    """

    op: str
    node: int
    reads: tuple[Read, ...]
    outs: tuple[int, ...]
    frees: list[int] = field(default_factory=list)
    out_box: Box = ()
    wanted: tuple[bool, ...] = ()
    value: int = -1
    shape: tuple[int, ...] = ()
    count: tuple[int, ...] = ()
    border: bool = False
    sweep: int = 0
    region: int = -1
    live: int = 0
    grows: int = 0


@dataclass(frozen=True, slots=True)
class Binding:
    """Where a peak stands: sweep, and the node or, where none runs (-1), the value that is moved."""

    sweep: int = 0
    node: int = -1
    value: int = -1


@dataclass(slots=True)
class Program:
    """Instructions, and where inputs are found and outputs left.

    `external` maps value index to slot for inputs, parameters and constants; `results` maps value index to slot
    for what the program leaves behind (outputs, kept values, gradients). `settles`: of a sweep whose steps are
    instructions, after how many of them its windows no longer depend on what they held before.
    `peaks`: bytes of each sweep at most.
    """

    instructions: list[Instruction]
    slots: int
    external: dict[int, int]
    results: dict[int, int] = field(default_factory=dict)
    grads: dict[int, int] = field(default_factory=dict)
    kept: tuple[int, ...] = ()
    peak: int = 0
    peaks: dict[int, int] = field(default_factory=dict)
    binding: Binding = Binding()
    macs: int = 0
    regions: int = 0
    settles: dict[int, int] = field(default_factory=dict)
