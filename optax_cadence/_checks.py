"""Checks of numbers, and how errors show what was found."""

import numbers
import operator
from typing import Any

import jax
import numpy as np

from optax_cadence import _paths

# Counters are int32.
LARGEST = 2**31 - 1


def integer(name: str, value: Any, least: int | None = None, others: str = "") -> int:
  """The value as an int.

  Args:
    name: What it is, for the error.
    value: Anything; an integer of NumPy, or of JAX where it is not traced, is one.
    least: If given, it must lie between this and the largest count.
    others: What else may stand there, for the error.

  Raises:
    ValueError: If it is no integer (truth values are none), or out of range.
  """
  expected = f"an integer{'' if least is None else f' of at least {least}'}{others}"
  number = whole(value)
  if number is None:
    raise ValueError(f"{name} must be {expected}, found {shown(value)}")
  if least is not None and number < least:
    raise ValueError(f"{name} must be {expected}, found {number}")
  if least is not None and number > LARGEST:
    raise ValueError(f"{name} must be at most {LARGEST}, the largest int32, found {number}")
  return number


def whole(value: Any) -> int | None:
  """The value as an int; None if it is no integer, as a truth value is none."""
  if isinstance(value, bool) or getattr(value, "dtype", None) == np.bool_:
    return None
  try:
    return operator.index(value)
  except TypeError:
    return None


def number(name: str, value: Any, low: float, high: float) -> Any:
  """The value, a real number in a range; a traced scalar is not looked into.

  Args:
    name: What it is, for the error.
    value: Anything; a scalar of NumPy or JAX is a number.
    low: The least that it may be.
    high: The most that it may be.

  Raises:
    ValueError: If it is no real number (truth values are none), or out of range.
  """
  is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if not is_number and hasattr(value, "dtype"):
    # A dtype of JAX may be none that NumPy knows as a kind of number.
    is_number = np.shape(value) == () and jax.dtypes.issubdtype(value.dtype, np.number)
  if is_number and isinstance(value, jax.core.Tracer):
    return value
  if not is_number or np.iscomplexobj(value) or not low <= float(value) <= high:
    raise ValueError(f"{name}: expected a number in [{low}, {high}], found {shown(value)}")
  return value


def shown(value: Any) -> str:
  """A value as errors show it: never the entries of an array, nor more than a line."""
  if _is_array(value):
    return f"an array of shape {np.shape(value)} and dtype {value.dtype}"
  try:
    arrays = [path for path, leaf in _paths.flatten_with_paths(value) if _is_array(leaf)]
  except ValueError:  # a dict whose keys cannot be sorted is no tree
    return _named(value)
  if arrays:
    return f"{_named(value)} of {len(arrays)} arrays, {_paths.listed(arrays)}"
  text = " ".join(repr(value).split())
  return text if len(text) <= 160 else f"{_named(value)}, {text[:100]}…"


def _is_array(value: Any) -> bool:
  return isinstance(value, np.ndarray | jax.Array | jax.ShapeDtypeStruct) and value.ndim > 0


def _named(value: Any) -> str:
  return f"a {type(value).__name__}"
