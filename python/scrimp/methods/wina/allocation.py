"""Which layer skips how much, at a given share of all weights."""

from __future__ import annotations

from .calibration import SPARSITIES, Calibration, Group


def uniform(calibration: Calibration, method: str, sparsity: float) -> list[list[float]]:
    """The same sparsity everywhere."""
    return [[sparsity for _ in layer] for layer in calibration.layers]


def greedy(calibration: Calibration, method: str, sparsity: float) -> list[list[float]]:
    """Within each decoder layer, steps go to the group whose squared relative error grows least per weight skipped."""
    return [_greedy(layer, method, sparsity) for layer in calibration.layers]


def _greedy(layer: tuple[Group, ...], method: str, sparsity: float) -> list[float]:
    sizes = [group.outputs * len(group.norms) for group in layer]
    curves = [[group.error(method, s) ** 2 for s in SPARSITIES] for group in layer]
    places, found = [0] * len(layer), [0.0] * len(layer)
    left = sparsity * sum(sizes)

    def price(g: int) -> float:
        at = places[g]
        return (curves[g][at + 1] - curves[g][at]) / (sizes[g] * (SPARSITIES[at + 1] - SPARSITIES[at]))

    while left > 0:
        g = min((g for g in range(len(layer)) if places[g] + 1 < len(SPARSITIES)), key=price)
        places[g] += 1
        step = min(left / sizes[g], SPARSITIES[places[g]] - found[g])
        found[g] += step
        left -= step * sizes[g] if step * sizes[g] < left else left
    return found


ALLOCATIONS = {"uniform": uniform, "greedy": greedy}
