"""Which layer skips how much, at a given share of all weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from .calibration import SPARSITIES, Calibration, Group
from .groups import gated

Shares = list[list[float]]


def weights(group: Group) -> int:
    """Of all layers of a group."""
    return group.outputs * len(group.norms)


def skippable(layer: Sequence[Group], method: str) -> list[int]:
    """How many weights a method can skip in each group of a decoder layer."""
    if method != "cats":
        return [weights(group) for group in layer]
    up = {group.names[-1]: group.outputs // len(group.names) * len(group.norms) for group in layer}
    name = next((name for name in up if name.endswith("mlp.up_proj")), None)
    return [weights(group) + up[name] if name is not None and gated(group.names) else 0 for group in layer]


def allocate(calibration: Calibration, method: str, sparsity: float, allocation: str) -> Shares:
    """For each decoder layer the sparsity of each of its groups.

    Raises:
        ValueError: the method cannot skip so much of this model.
    """
    layers = calibration.layers
    most = SPARSITIES[-1] * sum(sum(skippable(layer, method)) for layer in layers)
    total = sum(weights(group) for layer in layers for group in layer)
    if not most or sparsity * total > most * (1 + 1e-9):
        raise ValueError(
            f"sparsify: method={method!r} skips at most {most / total:.1%} of this model's weights, "
            f"not sparsity={sparsity}"
        )
    return ALLOCATIONS[allocation](calibration, method, sparsity)


def uniform(calibration: Calibration, method: str, sparsity: float) -> Shares:
    """The same sparsity everywhere."""
    found = []
    for layer in calibration.layers:
        sizes = skippable(layer, method)
        share = sparsity * (sum(map(weights, layer)) / sum(sizes))
        found.append([share if size else 0.0 for size in sizes])
    return found


def greedy(calibration: Calibration, method: str, sparsity: float) -> Shares:
    """Within each decoder layer, steps go to the group whose squared error grows least per weight skipped."""
    return [_greedy(layer, method, sparsity) for layer in calibration.layers]


def _greedy(layer: tuple[Group, ...], method: str, sparsity: float) -> list[float]:
    sizes = skippable(layer, method)
    curves = [squared_errors(group, method) for group in layer]
    places, found = [0] * len(layer), [0.0] * len(layer)
    left = sparsity * sum(map(weights, layer))

    def price(g: int) -> float:
        at = places[g]
        return (curves[g][at + 1] - curves[g][at]) / (sizes[g] * (SPARSITIES[at + 1] - SPARSITIES[at]))

    while left > 0:
        open_ones = [g for g in range(len(layer)) if sizes[g] and places[g] + 1 < len(SPARSITIES)]
        if not open_ones:
            break
        g = min(open_ones, key=price)
        places[g] += 1
        step = min(left / sizes[g], SPARSITIES[places[g]] - found[g])
        found[g] += step
        left -= step * sizes[g] if step * sizes[g] < left else left
    return found


def knapsack(calibration: Calibration, method: str, sparsity: float) -> Shares:
    """The shares of all groups of all layers with the least sum of squared errors at this many weights.

    Each curve is replaced by its lower hull, on which steps get dearer; the cheapest of all steps are taken.
    """
    flat = [group for layer in calibration.layers for group in layer]
    sizes = [size for layer in calibration.layers for size in skippable(layer, method)]
    steps: list[tuple[float, int, float]] = []  # price of a weight, group, sparsity after it
    for g, (group, size) in enumerate(zip(flat, sizes, strict=True)):
        if size:
            curve = squared_errors(group, method)
            corners = hull(curve)
            steps += [
                ((curve[b] - curve[a]) / (size * (SPARSITIES[b] - SPARSITIES[a])), g, SPARSITIES[b])
                for a, b in pairwise(corners)
            ]
    found, left = [0.0] * len(flat), sparsity * sum(map(weights, flat))
    for _, g, end in sorted(steps):
        step = min(max(left, 0.0) / sizes[g], end - found[g])
        found[g] += step
        left -= step * sizes[g]
    rest = iter(found)
    return [[next(rest) for _ in layer] for layer in calibration.layers]


def hull(curve: Sequence[float]) -> list[int]:
    """Points of SPARSITIES at the corners of a curve's lower convex hull."""
    corners: list[int] = []
    for c in range(len(curve)):
        while len(corners) > 1 and _slope(curve, corners[-2], corners[-1]) >= _slope(curve, corners[-1], c):
            corners.pop()
        corners.append(c)
    return corners


def _slope(curve: Sequence[float], a: int, b: int) -> float:
    return (curve[b] - curve[a]) / (SPARSITIES[b] - SPARSITIES[a])


def squared_errors(group: Group, method: str) -> list[float]:
    """Of a group's outputs at SPARSITIES, relative, by what the model minds."""
    return [group.sensitivity * group.error(method, s) ** 2 for s in SPARSITIES]


ALLOCATIONS: dict[str, Callable[[Calibration, str, float], Shares]] = {
    "uniform": uniform,
    "greedy": greedy,
    "knapsack": knapsack,
}
