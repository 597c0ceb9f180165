"""Draws the roofline: the bytes that a micro-step has to move against the time that it takes.

A filled point for each case, a hollow one above it for its peer, and a line: a program that only
moves those bytes lies on it.
"""

import pathlib
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from matplotlib.ticker import LogLocator
from matplotlib.ticker import NullFormatter

from benchmarks import machine
from benchmarks.targets import TIMES

# Okabe and Ito's colours, which can be told apart with any kind of colour vision.
OURS, PEER, LINE = "#0072B2", "#D55E00", "#000000"
LABEL_HEIGHT = 0.047  # of the axes


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
  """Saves the picture."""
  points = points_of(results)
  if not points:
    return
  figure = Figure(figsize=(10, 6.5), layout="constrained")
  axes = figure.add_subplot()
  roofline(axes, points)
  scatter(axes, points)
  label(axes, points)
  where = machine.title(results["machine"])
  quick = " (quick run: sizes that partly sit in cache)" if results["settings"]["quick"] else ""
  axes.set_title(f"A micro-step on {where}{quick}", loc="left")
  axes.legend(loc="upper left", frameon=False)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=150)


def points_of(results: dict[str, Any]) -> list[dict[str, Any]]:
  """Bytes and times of every case that has a floor and targets, the slowest first."""
  points = []
  for case in results["cases"]:
    by_name = {variant["name"]: variant for variant in case["variants"]}
    ours, peer = by_name.get(case["ours"]), by_name.get(case["peer"])
    if ours and "floor_bytes" in ours and case["targets"]:
      points.append(
        {
          "name": case["name"],
          "gigabytes": ours["floor_bytes"] / 1e9,
          "ours": ours["median_ms"],
          "low": ours["median_ms"] - ours["q1_ms"],
          "high": ours["q3_ms"] - ours["median_ms"],
          "peer": peer["median_ms"] if peer else None,
          "ratio": ours["ratio_floor"],
          "bandwidth": case["bandwidth_gb_s"],
        }
      )
  return sorted(points, key=lambda point: -point["ours"])


def roofline(axes: Axes, points: list[dict[str, Any]]) -> None:
  """The line: how long it takes to move the bytes at the median bandwidth of all cases."""
  bandwidth = float(np.median([point["bandwidth"] for point in points]))
  x = np.array([point["gigabytes"] for point in points])
  ends = np.array([x.min() / 1.6, x.max() * 1.6])
  axes.plot(
    ends, 1e3 * ends / bandwidth, color=LINE, label=f"median bandwidth, {bandwidth:.3g} GB/s"
  )
  axes.set(xscale="log", yscale="log", xlim=ends)
  axes.set_xlabel("gigabytes that a micro-step has to move")
  axes.set_ylabel("milliseconds per micro-step")
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())
  axes.grid(which="major", alpha=0.3)
  axes.spines[["top", "right"]].set_visible(False)


def scatter(axes: Axes, points: list[dict[str, Any]]) -> None:
  """The points: ours with its quartiles, and the peers."""
  x = [point["gigabytes"] for point in points]
  y = [point["ours"] for point in points]
  spread = [[point[side] for point in points] for side in ("low", "high")]
  for point in points:
    if point["peer"]:
      ends = [point["ours"], point["peer"]]
      axes.plot([point["gigabytes"]] * 2, ends, color=PEER, alpha=0.4, linewidth=1)
  peers = [(point["gigabytes"], point["peer"]) for point in points if point["peer"]]
  axes.errorbar(x, y, spread, fmt="o", color=OURS, markersize=7, label="optax_cadence", zorder=3)
  if peers:
    style = {"facecolors": "white", "edgecolors": PEER, "marker": "s", "zorder": 2}
    axes.scatter(*zip(*peers, strict=True), **style, label="its peer")


def label(axes: Axes, points: list[dict[str, Any]]) -> None:
  """Names in a column on the right, spread so that none covers another."""
  low, high = axes.get_ylim()
  axes.set_ylim(low, high)
  heights = [np.log(point["ours"] / low) / np.log(high / low) for point in points]
  for point, height in zip(points, spread(heights), strict=True):
    axes.annotate(
      f"{point['name']}  {point['ratio']:.3g} {TIMES} floor",
      xy=(point["gigabytes"], point["ours"]),
      xytext=(1.03, height),
      textcoords="axes fraction",
      va="center",
      fontsize=9,
      annotation_clip=False,
      arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "relpos": (0, 0.5)},
    )


def spread(heights: list[float]) -> list[float]:
  """Moves heights, given in falling order, apart by as little as keeps labels from touching."""
  gap = min(LABEL_HEIGHT, 1 / max(1, len(heights) - 1))
  placed: list[float] = []
  for height in heights:
    placed.append(min(height, placed[-1] - gap) if placed else min(height, 1.0))
  below = min(0.0, placed[-1])
  if below < 0:
    floor = 0.0
    for i in reversed(range(len(placed))):
      placed[i] = max(placed[i], floor)
      floor = placed[i] + gap
  return placed
