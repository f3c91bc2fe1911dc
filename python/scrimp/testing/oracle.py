"""The tolerance of op tests, derived from the working dtype's own error instead of chosen by hand."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [_cast(item, dtype) for item in value]
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def oracle_tolerance(exact: Tensor, plain: Tensor) -> float:
    """Largest error an implementation may have.

    2 max|plain - exact| + 2 eps max|exact|, with eps of the dtype of `plain`.

    Args:
        exact: the result in float64.
        plain: the same maths by plain torch in the working dtype.
    """
    finite = torch.isfinite(exact)
    if not finite.any():
        return 0.0
    error = (plain.double() - exact)[finite].abs().max().item()
    return 2 * error + 2 * torch.finfo(plain.dtype).eps * exact[finite].abs().max().item()


def assert_matches_oracle(
    got: Tensor | Sequence[Tensor],
    reference: Callable[..., Any],
    *args: Any,
    names: Sequence[str] = (),
) -> None:
    """Asserts that `got` is as close to the float64 reference as plain torch in the working dtype.

    Args:
        got: result (or results) of the implementation on `args`.
        reference: plain-torch function; runs once as given and once with floating tensors in float64.
        args: the arguments `got` was computed from.
        names: names of the results, for the message.

    Raises:
        AssertionError: shape or dtype differ, infinities or NaNs are not where the reference has them, or the error
            is above `oracle_tolerance`; the message names result, error, bound and position.
    """
    exact = reference(*(_cast(arg, torch.float64) for arg in args))
    plain = reference(*args)
    as_tuple = lambda result: (result,) if isinstance(result, Tensor) else tuple(result)  # noqa: E731
    got, exact, plain = as_tuple(got), as_tuple(exact), as_tuple(plain)
    if not len(got) == len(exact) == len(plain):
        raise AssertionError(f"{len(got)} results, the reference has {len(plain)}")
    for index, (value, truth, rough) in enumerate(zip(got, exact, plain, strict=True)):
        name = names[index] if index < len(names) else f"result {index}"
        if value.shape != rough.shape or value.dtype != rough.dtype:
            raise AssertionError(
                f"{name}: {value.dtype} {list(value.shape)}, expected {rough.dtype} {list(rough.shape)}"
            )
        if value.numel() == 0:
            continue
        finite = torch.isfinite(truth)
        wild, expected = value.double().cpu(), truth.cpu()
        if not torch.equal(wild[~finite.cpu()].nan_to_num(nan=7.0), expected[~finite.cpu()].nan_to_num(nan=7.0)):
            raise AssertionError(f"{name}: infinities or NaNs are not where the reference has them")
        error = torch.where(finite, (value.double() - truth).abs(), 0.0).nan_to_num(nan=float("inf"))
        bound = oracle_tolerance(truth, rough)
        worst = int(error.argmax())
        if error.flatten()[worst].item() > bound:
            position = [int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape)]
            raise AssertionError(
                f"{name}: error {error.flatten()[worst]:.3e} above the bound {bound:.3e} at {position}: "
                f"got {value.flatten()[worst]}, exact {truth.flatten()[worst]}"
            )
