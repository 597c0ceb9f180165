"""Reading and writing NNX variables, in every version of Flax that is supported."""

from typing import Any


def get(variable: Any) -> Any:
  """The array in a variable."""
  return variable.get_value() if hasattr(variable, "get_value") else variable.value


def put(variable: Any, value: Any) -> None:
  """Puts an array into a variable."""
  if hasattr(variable, "set_value"):
    variable.set_value(value)
  else:
    variable.value = value
