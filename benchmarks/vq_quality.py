"""What sharing codes costs a model: perplexity, divergence, agreement and time of VQ heads beside the dense head.

    python -m scrimp.benchmarks.vq_quality demo-dithered --csv device

The codebooks are made from the model's head and its states on calibration texts; "tuned" heads are then trained on the
next tokens of those texts, the model itself fixed. All are judged on windows of the held-out documents.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import scrimp
from scrimp._registry import OPS
from scrimp.demo import text
from scrimp.demo.model import named_model
from scrimp.methods.evaluate import PROTOCOL, Reader, quality
from scrimp.methods.generation.linear import fuse
from scrimp.methods.heads import VQLogitsHead
from scrimp.methods.heads.exact import hidden_states

from . import measure
from .quality import Kept, add_outputs, row, write
from .results import Row

CODES = (256, 1024, 4096, 16384)
REPAIRS = ("plain", "metric", "singles", "bias", "tuned", "residual")
BATCH = 512  # states of a training step
RATE = 1e-4  # Adam's first step size, which falls to 0
TIMED_S = 0.5


class Headed(Reader):
    """A reader's states under another head."""

    def __init__(self, reader: Reader, head: VQLogitsHead) -> None:
        super().__init__(reader.model)
        self._reader = reader
        self.view = replace(reader.view, head=fuse([head]))

    def states(self, tokens: Tensor) -> Tensor:
        return self._reader.states(tokens)


def heads(
    weight: Tensor, K: int, texts: Tensor, states: Tensor, wanted: Sequence[str], steps: int, iterations: int
) -> Iterator[tuple[str, VQLogitsHead]]:
    """Each repair's head, with everything that those before it in REPAIRS have; "residual" is not trained."""
    counts = torch.bincount(texts.flatten(), minlength=len(weight))
    fit: dict[str, Any] = {"iterations": iterations}
    if "plain" in wanted:
        yield "plain", VQLogitsHead.from_head(weight, K, **fit)
    fit["states"] = states
    if "metric" in wanted:
        yield "metric", VQLogitsHead.from_head(weight, K, bias=False, **fit)
    fit["counts"] = counts
    if {"singles", "bias", "tuned"} & set(wanted):
        head = VQLogitsHead.from_head(weight, K, **fit)
        if "singles" in wanted:
            yield "singles", VQLogitsHead(head.codebook, head.codes)
        if "bias" in wanted:
            yield "bias", head
        if "tuned" in wanted:
            yield "tuned", tuned(head, texts, states, steps)
    if "residual" in wanted:
        yield "residual", VQLogitsHead.from_head(weight, K, levels=2, **fit)


def tuned(head: VQLogitsHead, texts: Tensor, states: Tensor, steps: int) -> VQLogitsHead:
    """A copy whose codebook and bias are trained on what follows each state."""
    head = VQLogitsHead(head.codebook, head.codes, head.bias)
    before = states.view(*texts.shape, -1)[:, :-1].flatten(0, 1)
    target = texts[:, 1:].flatten()
    optimiser = torch.optim.Adam(head.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        some = torch.randint(len(target), (BATCH,), generator=generator)
        optimiser.zero_grad()
        head.loss(before[some], target[some]).mean().backward()
        optimiser.step()
        schedule.step()
    return head


def times(head: VQLogitsHead, weight: Tensor, x: Tensor) -> Row:
    """Milliseconds for all logits of one state, and how many times as long the dense head takes."""
    with torch.no_grad():
        calls = {"dense": lambda: OPS["linear"].call(x, [weight], [], None)}
        samples = measure.interleave(lambda: head(x), calls, [], TIMED_S)
    ours = 1e3 * measure.median(samples.ours["dense"])
    return {"head_ms": float(f"{ours:.3g}"), "head_ratio": float(f"{samples.ratio('dense').median:.3g}")}


HEAD = (
    f"{'head':<15} {'share':>7}  {'perplex.':>10}  {'ratio':>8}  {'KL mean':>8}  {'top-1':>7}  {'ms':>7}  {'faster':>7}"
)


def line(row: Row) -> str:
    """A row for people."""
    return (
        f"{row['case']:<15} {row['share']:7.2%}  {row['perplexity']:10.2f}  {row['perplexity_ratio']:8.3f}  "
        f"{row['kl_mean']:8.4f}  {row['top1_agreement']:7.2%}  {row['head_ms']:7.3f}  {row['head_ratio']:6.1f}x"
    )


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="what scrimp.load takes, or demo-dithered")
    parser.add_argument("--codes", nargs="+", type=int, default=list(CODES), metavar="K")
    parser.add_argument("--repairs", nargs="+", default=list(REPAIRS), choices=REPAIRS)
    parser.add_argument("--texts", type=int, default=48, metavar="N", help="calibration texts (default 48)")
    parser.add_argument("--length", type=int, default=512, metavar="N", help="tokens of each (default 512)")
    parser.add_argument("--window", type=int, default=512, metavar="N", help="tokens of a window (default 512)")
    parser.add_argument("--windows", type=int, default=8, metavar="N", help="held-out windows (default 8)")
    parser.add_argument("--iterations", type=int, default=5, metavar="N", help="of k-means (default 5)")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help=f"of {BATCH} states each (default 100)")
    add_outputs(parser)
    asked = parser.parse_args(words)
    model, tokenizer = scrimp.load(named_model(asked.model))
    texts = text.windows(tokenizer, asked.length, "calibration", asked.texts)
    windows = text.windows(tokenizer, asked.window, "heldout", asked.windows)
    print(f"protocol: {PROTOCOL}")
    print(f"{len(windows)} windows of {asked.window} tokens; calibrated on {len(texts)} texts of {asked.length}")
    weight, states = model.get_output_embeddings().weight.detach(), hidden_states(model, texts)
    reference, rows = Kept(model), list[Row]()
    fields = {"windows": len(windows), "window_tokens": asked.window, "vocab": len(weight), "d": weight.shape[1]}
    fields |= {"texts": texts.numel(), "iterations": asked.iterations, "steps": asked.steps}
    print(HEAD)
    for K in asked.codes:
        for repair, head in heads(weight, K, texts, states, asked.repairs, asked.steps, asked.iterations):
            found, dense = quality(Headed(reference, head), windows, reference)
            stored = sum(tensor.nbytes for tensor in head.state_dict().values())
            own = {"codes": K, "share": float(f"{stored / weight.nbytes:.4g}")} | times(head, weight, states[:1])
            rows.append(row("vq_quality", f"{repair}-{K}", found, dense.perplexity, fields | own))
            print(line(rows[-1]), flush=True)
    print(f"dense: perplexity {rows[0]['reference_perplexity']}")
    write(asked, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
