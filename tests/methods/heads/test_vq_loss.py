"""vq_cross_entropy against autograd through the scattered logits: values, gradients, memory."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scrimp._registry import OPS
from scrimp.methods.heads import vq_cross_entropy, vq_loss

SHAPES = {"one code": (50,), "a level": (1, 50), "two codes": (2, 50), "chunks": (3, 2 * vq_loss.CHUNK + 5)}


def arguments(codes: tuple[int, ...], with_bias: bool = True, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Six rows of a head of 9 codes, of which the last two have no token."""
    made = {"h": torch.randn(2, 3, 5, dtype=dtype), "codebook": torch.randn(9, 5, dtype=dtype)}
    made |= {"bias": torch.randn(codes[-1], dtype=dtype)} if with_bias else {}
    made = {name: tensor.requires_grad_() for name, tensor in made.items()}
    return made | {"codes": torch.randint(7, codes, dtype=torch.int32), "target": torch.randint(codes[-1], (2, 3))}


def scattered(h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None = None, *, target: Tensor) -> Tensor:
    logits = OPS["vq_logits"].reference(h, codebook, codes, bias)
    return cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none").view(target.shape)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_that_of_the_scattered_logits(shape: str, with_bias: bool) -> None:
    """Losses and all gradients, in float64."""
    args = arguments(SHAPES[shape], with_bias)
    got, expected = vq_cross_entropy(**args), scattered(**args)
    torch.testing.assert_close(got, expected)
    wanted = [tensor for tensor in args.values() if tensor.requires_grad]
    weights = torch.rand_like(got)
    for ours, theirs in zip(*(torch.autograd.grad(x, wanted, weights) for x in (got, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", ["one code", "two codes"])
def test_gradcheck(shape: str) -> None:
    args = arguments(SHAPES[shape])
    fixed = {name: args.pop(name) for name in ("codes", "target")}
    names = list(args)
    assert torch.autograd.gradcheck(
        lambda *some: vq_cross_entropy(**dict(zip(names, some, strict=True)), **fixed), tuple(args.values())
    )


@pytest.mark.parametrize("codes", [(40,), (2, 40)])
def test_low_precision_is_summed_in_fp32(codes: tuple[int, ...]) -> None:
    args = arguments(codes, dtype=torch.bfloat16)
    loss = vq_cross_entropy(**args)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    scores = (args["h"] @ args["codebook"].T).detach().float()
    exact = vq_loss.token_scores(scores, args["codes"], args["bias"].detach().float())
    torch.testing.assert_close(
        loss.detach(), cross_entropy(exact.flatten(0, 1), args["target"].flatten(), reduction="none").view(2, 3)
    )
    assert all(args[name].grad.dtype == torch.bfloat16 for name in ("h", "codebook", "bias"))


class Watch(TorchDispatchMode):
    """Notes the elements of the largest floating-point result of any operator."""

    most = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = call(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor) and x.is_floating_point()]
        self.most = max([self.most, *sizes])
        return result


def largest_tensor(V: int, codes: tuple[int, ...], with_bias: bool) -> int:
    """Elements of the largest tensor, forward and backward, of 64 rows."""
    args = arguments((*codes, V), with_bias, torch.float32)
    args["h"] = torch.randn(64, 5, requires_grad=True)
    args["target"] = torch.randint(V, (64,))
    with Watch() as watch:
        vq_cross_entropy(**args).sum().backward()
    return watch.most


@pytest.mark.parametrize("with_bias", [True, False])
def test_no_tensor_is_rows_times_vocabulary(with_bias: bool) -> None:
    rows, K, V = 64, 9, 30_000
    assert largest_tensor(V, (), with_bias) == (V if with_bias else rows * K)
    assert largest_tensor(V, (2,), with_bias) == rows * vq_loss.CHUNK


@pytest.mark.parametrize("shape", ["one code", "two codes"])
def test_broken_scores(shape: str) -> None:
    """A NaN reaches its own row; codes without a token do not matter."""
    args = arguments(SHAPES[shape])
    with torch.no_grad():
        args["codebook"][7:] = torch.nan
        args["h"][0] = torch.nan
    loss = vq_cross_entropy(**args)
    assert loss[0].isnan().all()
    assert loss[1].isfinite().all()


BAD = {
    "code": ({"codes": torch.tensor([0, 9, 3]).int(), "bias": None}, r"codes\[1\]=9 is not one of the 9 rows"),
    "negative code": (
        {"codes": torch.tensor([0, -1, 3]).int(), "bias": None},
        r"codes\[1\]=-1 is not one of the 9 rows",
    ),
    "no codes": ({"codebook": torch.zeros(0, 5).double()}, "is not one of the 0 rows"),
    "codes": ({"codes": torch.tensor([0.5])}, "codes is float32; it must be int32"),
    "integer h": ({"h": torch.zeros(2, 3, 5).int()}, "h is int32; it must be float32"),
    "dtype of codebook": ({"codebook": torch.zeros(9, 5)}, "dtype of codebook is torch.float32"),
    "dtype of bias": ({"bias": torch.zeros(50)}, "dtype of bias is torch.float32"),
    "target": ({"target": torch.tensor([[0, 1, 50], [0, 0, 0]])}, "target 50 is not one of the 50 tokens"),
    "negative target": ({"target": torch.full((2, 3), -1)}, "target -1 is not one of the 50 tokens"),
    "shape of target": ({"target": torch.zeros(6).long()}, r"target is int64 \[6\], expected int64 \[2, 3\]"),
    "dtype of target": ({"target": torch.zeros(2, 3)}, r"target is float32 \[2, 3\]"),
    "codebook": ({"codebook": torch.zeros(9, 4).double()}, r"codebook has shape \[9, 4\]"),
    "no token": ({"codes": torch.zeros(0).int(), "bias": None}, "is not one of the 0 tokens"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    changes, words = BAD[case]
    with pytest.raises(ValueError, match=f"vq_cross_entropy: .*{words}"):
        vq_cross_entropy(**(arguments((50,)) | changes))


@pytest.mark.parametrize("codes", [(1,), (2, 1)])
def test_one_token_of_one_code(codes: tuple[int, ...]) -> None:
    """It is certain: no loss, no gradient."""
    args = arguments((50,)) | {"codes": torch.zeros(codes, dtype=torch.int32), "target": torch.zeros(2, 3).long()}
    args |= {name: args[name].detach()[:1].requires_grad_() for name in ("codebook", "bias")}
    loss = vq_cross_entropy(**args)
    torch.testing.assert_close(loss, torch.zeros_like(loss))
    for grad in torch.autograd.grad(loss.sum(), [args["h"], args["codebook"], args["bias"]]):
        torch.testing.assert_close(grad, torch.zeros_like(grad))


def test_no_rows() -> None:
    args = arguments((50,)) | {"h": torch.zeros(0, 5).double(), "target": torch.zeros(0).long()}
    assert vq_cross_entropy(**args).shape == (0,)
