"""What the benchmarks run on: device, memory, versions, and a file name made of them.

The name of the host is never among it.
"""

import importlib.metadata
import os
import platform
import re
from typing import Any

import jax


def describe() -> dict[str, Any]:
  """Device kind, CPU model, cores and memory."""
  device = jax.devices()[0]
  return {
    "backend": device.platform,
    "device": cpu_model() if device.platform == "cpu" else device.device_kind,
    "cpu": cpu_model(),
    "cores": cores(),
    "memory_gb": round(memory() / 1e9, 1),
  }


def versions() -> dict[str, str]:
  """Python and the packages that decide what is compiled."""
  packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax")}
  return {"python": platform.python_version(), **packages}


def title(machine: dict[str, Any]) -> str:
  """A name for people: that of the device, and of a CPU the number of cores."""
  if machine["backend"] == "cpu":
    return f"{machine['device']}, {machine['cores']} cores"
  return machine["device"]


def slug(text: str) -> str:
  """Text as a file name."""
  return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def memory() -> int:
  """Bytes of memory that arrays on the device may take."""
  device = jax.devices()[0]
  stats = device.memory_stats() if device.platform != "cpu" else None
  if stats and "bytes_limit" in stats:
    return int(stats["bytes_limit"])
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cores() -> int:
  """Cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def cpu_model() -> str:
  """The name of the processor, as it reports it."""
  try:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
      names = re.findall(r"^model name\s*: (.+)$", file.read(), re.MULTILINE)
  except OSError:
    names = []
  return names[0].strip() if names else platform.processor() or platform.machine()
