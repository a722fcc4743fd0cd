"""Matrix products, attention and tables: rows are local, the contracted dimension is read whole."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from ranger_nn.core.graph import Rule
from ranger_nn.core.reach import Link
from ranger_nn.ops.pointwise import Shape, aligned


def linear(shape: Shape, others: list[Shape]) -> Rule:
    """x @ W.T + b: every dimension of x but the last is local."""
    row = (*(Link(d) for d in range(len(shape) - 1)), None)
    return Rule((row, *((None,) * len(s) for s in others)))


def embedding(table: Shape, indices: Shape) -> Rule:
    """Rows of `table`: every index is local, the table is read whole."""
    return Rule(((None,) * len(table), tuple(Link(d) for d in range(len(indices)))))


def matmul(left: Shape, right: Shape, out: Shape, cut_columns: bool) -> Rule:
    """Batch dimensions are local; then either the rows of `left` or (`cut_columns`) the columns of `right`."""
    if len(left) < 2 or len(right) < 2:
        return Rule(((None,) * len(left), (None,) * len(right)))
    rank = len(out)
    batch_l = aligned(left[:-2], out[:-2])
    batch_r = aligned(right[:-2], out[:-2])
    rows = None if cut_columns else Link(rank - 2)
    columns = Link(rank - 1) if cut_columns else None
    return Rule(((*batch_l, rows, None), (*batch_r, None, columns)))


def attention(shapes: Sequence[Shape], out: Shape) -> Rule:
    """softmax(q k') v: batch, heads and queries are local; keys and values are read whole."""
    rank = len(out)
    rows: list[tuple[Link | None, ...]] = []
    for i, shape in enumerate(shapes):
        lead = aligned(shape[:-2], out[:-2])
        queries = Link(rank - 2) if i in (0, 3) and shape[-2] == out[-2] else None
        rows.append((*lead, queries, None))
    return Rule(tuple(rows))


def product(operands: Sequence[Sequence[Hashable]], out: Sequence[Hashable], cut: int) -> Rule:
    """A sum of products over labelled dimensions, as in `einsum`: operand `cut` may be cut along its labels in `out`.

    Labels of the others follow where they have the same; what `cut` does not have is read whole. So the two sides of a
    product, which may come from the same tokens, are never cut along the same axis twice. None, or a label that an operand
    repeats (a diagonal), is read whole.
    """
    place = {label: d for d, label in enumerate(out) if label is not None}
    free = {label for label in operands[cut] if label in place}
    return Rule(
        tuple(
            tuple(Link(place[label]) if label in free and list(labels).count(label) == 1 else None for label in labels)
            for labels in operands
        )
    )
