"""Plain text tables, as the summaries of this package print them."""

from collections.abc import Iterable, Sequence
from typing import Any


def lines(rows: Iterable[Sequence[Any]], left: int) -> list[str]:
  """Rows as lines of aligned columns, of which the first `left` are flush left."""
  cells = [[str(cell) for cell in row] for row in rows]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return [
    "  ".join(
      cell.ljust(width) if i < left else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in cells
  ]
