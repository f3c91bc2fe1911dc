"""How much the model minds errors of each group of layers, from gradients of the log-likelihood."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

TEXTS = 4  # whose tokens are sampled anew
TOKENS = 256  # of each at most


def sensitivities(
    model: nn.Module, groups: Sequence[Sequence[tuple[str, ...]]], texts: Sequence[Tensor]
) -> list[float]:
    """For each group the mean over tokens of |g|^2 |y|^2 / N, g the gradient at its outputs y (biases left out).

    Half of it times the squared relative error is what an error of random direction adds to the divergence from the
    model itself, to second order: gradients are those of the log-likelihood of tokens that the model itself draws.
    One text with all its activations is in memory at a time.

    Args:
        model: a dense one; it is left as it was.
        groups: for each decoder layer names of the linear layers of one input.
        texts: int64 `[1, n]` each; the first few are read.
    """
    names = [group for layer in groups for group in layer]
    found = torch.zeros(len(names), dtype=torch.float64)
    random = torch.Generator().manual_seed(0)
    with _frozen(model):
        for tokens in texts[:TEXTS]:
            wanted = [name for group in names for name in group]
            with torch.inference_mode(False), torch.enable_grad(), _outputs(model, wanted) as outputs:
                logits = model(tokens[:, :TOKENS], use_cache=False).logits[0].float()
                drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=random)[:, 0]
                cross_entropy(logits, drawn.to(logits.device), reduction="sum").backward()
            for i, group in enumerate(names):
                found[i] += sum(_of_layer(model, name, outputs[name]) for name in group)
    return (found / len(texts[:TEXTS])).tolist()


def _of_layer(model: nn.Module, name: str, output: Tensor) -> float:
    bias = model.get_submodule(name)._parameters.get("bias")
    y = output.detach()[0, 1:].float() - (0 if bias is None else bias.detach().float())
    g = output.grad[0, 1:].float()  # type: ignore[index]
    return float((g.square().sum(-1) * y.square().sum(-1)).mean()) / y.shape[-1]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients of parameters; those of activations begin at the embedding."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    hook = embedding.register_forward_hook(lambda _, args, output: output.requires_grad_())
    try:
        yield
    finally:
        hook.remove()
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextmanager
def _outputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Outputs of some layers, whose gradients are kept."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> torch.utils.hooks.RemovableHandle:
        def look(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            found[name] = output

        return model.get_submodule(name).register_forward_hook(look)

    handles = [keep(name) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
