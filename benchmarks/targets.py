"""What a case has to reach, and whether it did.

A target compares a variant with the floor, with another variant, or with a limit on memory. The
numbers are measured in `measure`.
"""

import dataclasses
from typing import Any

TIMES = "\N{MULTIPLICATION SIGN}"

# Temporaries that do not count: counters, flags and the like.
_SCALAR_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class Target:
  """`variant` is at most `limit` times what it is compared with.

  Attributes:
    variant: Name of the variant.
    against: `"floor"`; `"seconds"`; `"temporaries"` (over the bytes of `allowance`); `"held bytes"`
      (what the compiled held micro-step accesses, over its floor); or a variant's name.
    limit: The largest ratio that meets the target.
    noise: Whether a ratio above the limit still meets it where the quartiles overlap.
    allowance: Bytes of temporaries that count as 1.
    allowed: What these bytes are, in words.
    measure: What is compared with that of another variant: the time, or the `"temp_bytes"`.
  """

  variant: str
  against: str
  limit: float
  noise: bool = False
  allowance: int = 0
  allowed: str = "the largest leaf"
  measure: str = "median_ms"

  @property
  def headline(self) -> bool:
    """Whether the README has a row for it: it is about time, and not just about being no slower."""
    about_time = self.against not in ("seconds", "temporaries", "held bytes")
    return about_time and self.measure == "median_ms" and not self.noise

  def __str__(self) -> str:
    if self.against == "temporaries":
      return f"temporaries ≤ {self.allowed}"
    if self.against == "held bytes":
      return "held micro-step accesses its floor's bytes"
    if self.against == "seconds":
      return f"≤ {self.limit:g} s"
    limit = f"≤ {self.limit:g} {TIMES} {self.against}"
    if self.measure != "median_ms":
      return f"temporaries {limit}"
    return f"{limit} (or within the spread)" if self.noise else limit


def evaluate(target: Target, variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
  """A target as the JSON file holds it: with the ratio found, and whether that meets it.

  Both are None where the ratio is not known.
  """
  value, met = _value(target, variants), None
  if value is not None:
    met = value <= target.limit or (target.noise and _overlap(target, variants))
  result = {"text": str(target), "headline": target.headline, "value": value, "met": met}
  return dataclasses.asdict(target) | result


def _value(target: Target, variants: dict[str, dict[str, Any]]) -> float | None:
  ours = variants.get(target.variant, {})
  if target.against == "floor":
    return ours.get("ratio_floor")
  if target.against == "held bytes":
    return ours.get("ratio_held_bytes")
  if target.against == "seconds":
    return ours["median_ms"] / 1e3 if "median_ms" in ours else None
  if target.against == "temporaries":
    temporaries = ours.get("temp_bytes")
    return None if temporaries is None else max(0, temporaries - _SCALAR_BYTES) / target.allowance
  theirs = variants.get(target.against, {})
  values = ours.get(target.measure), theirs.get(target.measure)
  return None if None in values else values[0] / values[1]


def _overlap(target: Target, variants: dict[str, dict[str, Any]]) -> bool:
  ours, theirs = variants[target.variant], variants[target.against]
  return ours["q1_ms"] <= target.limit * theirs["q3_ms"]
