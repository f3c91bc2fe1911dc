"""e2e: the demo model generates greedily, beside Hugging Face's own loops and llama.cpp.

Prompts are texts of the held-out documents; "copy" asks for a text that is mostly in the prompt, the best case of
prompt lookup. The "tree" cases decode by trees whose sources know nothing but the prompt, those named after a kind of
trained maps by these too (`draft_maps.py` trains them at the first use). The limit: every new token reads all weights
of the model once.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import scrimp
from scrimp.demo import text
from scrimp.demo.model import demo_model_path
from scrimp.methods.evaluate import Reader, quality
from scrimp.methods.generation import DecoderModel, decoder_model
from scrimp.methods.tree_decoding import (
    CostCurve,
    DraftMaps,
    DraftSource,
    LookupDraft,
    NgramDraft,
    RecyclingDraft,
    trained,
)
from scrimp.testing import same_bits

from . import draft_maps
from .peers import hf
from .registry import Call, Case, Problem, Work
from .same_choices import recorded_choices, replayed_choices
from .tree_exact import recorded

FP32, BF16 = torch.float32, torch.bfloat16
NEAR_TIE = {FP32: 1e-3, BF16: 0.5}  # by how much Hugging Face's logits may prefer another token than ours
INT8_TIE = 0.5  # a rounding error may move an activation of 8 bits by a whole step
QUALITY_TOKENS = 512
GROUP_SIZE = 64
SPARSITY, SPARSE_TEXTS, SPARSE_TOKENS = 0.5, 8, 512
WINDOW, WINDOWS = 512, 4  # tokens and number of the texts that make the exact head's basis
QUESTIONS = {
    "tree-copy": "Repeat the text above word for word.",
    "tree-summary": text.QUESTION,
    "tree-code": "Write a Python class for a stack with push, pop and peek, and show how to use it.",
    "tree-chat": "What should I see in Rome in two days?",
    "tree-story": "Tell me a short story about a fox and a lighthouse.",
}
HEADS = {
    "head": {},
    "head-int4": {},
    "head-top-50": {"temperature": 0.8, "top_k": 50, "seed": 1},
}  # how tokens are chosen
READING = ("tree-copy", "tree-summary")  # their questions are about a text
TREE_TOKENS = 96  # new ones of a "tree" case


def cases() -> list[Case]:
    """One sequence and four, a long prompt, and a text that copies."""
    return [
        case("decode", FP32, prompt=64, new=64, batch=1, peers=("hf", "hf_lookup", "llama")),
        case("decode-batch", FP32, prompt=64, new=64, batch=4, peers=("hf",)),
        case("long", FP32, prompt=2048, new=32, batch=1, peers=("hf",)),
        case("copy", FP32, prompt=300, new=64, batch=1, peers=("hf", "hf_lookup")),
        case("decode", BF16, prompt=64, new=64, batch=1, peers=("hf",)),
        *(int4_case(stock, mode, prompt=64, new=64) for stock in (False, True) for mode in ("int8", "exact")),
        *(sparse_case(mode, prompt=64, new=64) for mode in ("", "exact")),
        *(head_case(kind, prompt=64, new=64) for kind in HEADS),
        *(tree_case(name, "", 300, 1, ("self-plain", "hf_lookup")) for name in QUESTIONS),
        tree_case("tree-text", "", 64, 1, ("self-plain", "hf_lookup")),
        tree_case("tree-text-batch", "", 64, 4, ("self-plain",)),
        *(
            tree_case(name, kind, 300, 1, ("self-plain", "hf_lookup"))
            for kind in draft_maps.KINDS
            for name in QUESTIONS
        ),
    ]


def case(name: str, dtype: torch.dtype, prompt: int, new: int, batch: int, peers: tuple[str, ...]) -> Case:
    """One case."""
    shape = {"m": batch, "batch": batch, "n": prompt, "new_tokens": new}
    return Case("e2e", name, dtype, shape, peers, partial(problem, name, dtype, prompt, new, batch))


def tree_case(about: str, kind: str, prompt: int, batch: int, peers: tuple[str, ...]) -> Case:
    """Tree decoding of a kind of text: by the sources that need no training, and by a kind of trained maps if named."""
    shape = {"m": batch, "batch": batch, "n": prompt, "new_tokens": TREE_TOKENS}
    name = f"{about}-{kind}" if kind else about
    return Case("e2e", name, FP32, shape, peers, partial(tree_problem, about, kind, prompt, batch))


def int4_case(stock: bool, mode: str, prompt: int, new: int) -> Case:
    """Decoding with 4-bit layers, by our loop beside itself in fp32, or by Hugging Face's on both sides."""
    shape = {"m": 1, "batch": 1, "n": prompt, "new_tokens": new, "group_size": GROUP_SIZE}
    name, peers = (f"int4-stock-{mode}", ("hf",)) if stock else (f"int4-{mode}", ("hf", "self-fp32"))
    make = partial(stock_int4_problem if stock else int4_problem, mode, prompt, new)
    return Case("e2e", name, FP32, shape, peers, make)


def sparse_case(mode: str, prompt: int, new: int) -> Case:
    """Decoding with half of the channels, beside Hugging Face's loop with that model and ours with the dense one.

    With a mode the layers are 4-bit ones, of the dense one, too; self-fp32 is our loop with the model in fp32.
    """
    shape = {"m": 1, "batch": 1, "n": prompt, "new_tokens": new}
    name, peers = (
        (f"sparse-int4-{mode}", ("hf", "self-dense", "self-fp32")) if mode else ("sparse", ("hf", "self-dense"))
    )
    return Case("e2e", name, FP32, shape, peers, partial(sparse_problem, mode, prompt, new))


def head_case(kind: str, prompt: int, new: int) -> Case:
    """Decoding with the exact head beside the dense one, both by our loop."""
    shape = {"m": 1, "batch": 1, "n": prompt, "new_tokens": new}
    return Case("e2e", kind, FP32, shape, ("self-dense-head",), partial(head_problem, kind, prompt, new))


@cache
def loaded(dtype: torch.dtype) -> tuple[Any, Any]:
    """The demo model and its tokenizer."""
    return scrimp.load(demo_model_path(), dtype)


@cache
def quantized(mode: str) -> Any:
    """The demo model with 4-bit layers, rounded to nearest; its head stays dense."""
    model = copy.deepcopy(loaded(FP32)[0])
    scrimp.quantize(model, "rtn", GROUP_SIZE, mode=mode)
    return model


@cache
def sparsified(mode: str) -> Any:
    """The demo model, in fp32 or with 4-bit layers of a mode, skipping channels by scrimp's defaults."""
    dense, tokenizer = loaded(FP32)
    texts = text.windows(tokenizer, SPARSE_TOKENS, "calibration", SPARSE_TEXTS)
    model = copy.deepcopy(quantized(mode) if mode else dense)
    scrimp.sparsify(model, scrimp.calibrate(model, texts, progress=False), SPARSITY)
    return model


def prompts(name: str, tokenizer: Any, length: int, batch: int) -> Tensor:
    """int64 `[batch, length]`."""
    name = "tree-copy" if name == "copy" else name
    if name not in QUESTIONS:
        return text.windows(tokenizer, length, "heldout", batch)
    if name not in READING:
        return chat(tokenizer, QUESTIONS[name]).expand(batch, -1)
    return text.prompt(tokenizer, length, text.corpus("heldout"), QUESTIONS[name]).expand(batch, -1)


def chat(tokenizer: Any, asked: str) -> Tensor:
    """int64 `[1, n]`: a question as the model was taught to read one."""
    message = [{"role": "user", "content": asked}]
    rendered = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return torch.tensor([tokenizer(rendered, add_special_tokens=False)["input_ids"]])


def problem(name: str, dtype: torch.dtype, length: int, new: int, batch: int) -> Problem:
    """Inputs, call, check and limit of the demo model."""
    model, tokenizer = loaded(dtype)
    return of_model(model, prompts(name, tokenizer, length, batch), new)


def tree_problem(about: str, kind: str, length: int, batch: int) -> Problem:
    """Trees beside plain decoding of the same model."""
    model, tokenizer = loaded(FP32)
    maps = DraftMaps.load(draft_maps.path(kind)) if kind else None

    def sources() -> list[DraftSource]:
        free: list[DraftSource] = [LookupDraft(), NgramDraft(), RecyclingDraft()]
        return free if maps is None else [*free, trained(maps)]

    return of_model(model, prompts(about, tokenizer, length, batch), TREE_TOKENS, trees=sources)


def int4_problem(mode: str, length: int, new: int) -> Problem:
    """Our loop: the peer hf runs the same 4-bit model, self-fp32 is our loop with the dense one."""
    dense, tokenizer = loaded(FP32)
    model, ids = quantized(mode), prompts("int4", tokenizer, length, 1)
    problem = of_model(model, ids, new, INT8_TIE if mode == "int8" else NEAR_TIE[FP32])
    return replace(problem, own={"self-fp32": of_model(dense, ids, new).ours}, fields={**problem.fields, "mode": mode})


def stock_int4_problem(mode: str, length: int, new: int) -> Problem:
    """Hugging Face's loop: ours runs the 4-bit model, the peer hf the dense one."""
    problem = int4_problem(mode, length, new)
    model, ids, _ = problem.inputs
    ours = hf.e2e(model, ids, new).call
    return replace(
        problem,
        inputs=(loaded(FP32)[0], ids, new),
        ours=ours,
        own={},
        fields={**problem.fields, "profile": "stock"},
    )


def sparse_problem(mode: str, length: int, new: int) -> Problem:
    """4-bit layers run in exact mode: 8-bit activations move the choice of channels, and so Hugging Face's tokens."""
    fp32, tokenizer = loaded(FP32)
    model, ids = sparsified(mode), prompts("sparse", tokenizer, length, 1)
    own = {"self-dense": quantized(mode) if mode else fp32, "self-fp32": fp32}
    return replace(
        problem := of_model(model, ids, new),
        check=lambda got: sparse_check(model, ids, got),
        own={name: of_model(other, ids, new).ours for name, other in own.items()},
        fields={**problem.fields, "sparsity": SPARSITY, "mode": mode},
    )


def head_problem(kind: str, length: int, new: int) -> Problem:
    """Ours has the exact head, with a basis made of calibration texts; the tokens must be the dense head's."""
    dense, tokenizer = loaded(FP32)
    model = quantized("int8") if kind == "head-int4" else dense
    ids, choice = prompts(kind, tokenizer, length, 1), HEADS[kind]
    watch = HeadWatch()
    with_dense = of_model(model, ids, new, wrap=watch.on, **choice)
    head: Any = scrimp.compress_head(model, "exact", tokens=text.windows(tokenizer, WINDOW, "calibration", WINDOWS))
    problem = of_model(model, ids, new, **choice)
    scrimp.compress_head(model, "dense")
    expected = watch.generation(with_dense.ours)

    def same(got: Tensor) -> None:
        if not torch.equal(got, expected):
            raise AssertionError(f"only {int((got == expected).sum())} of {new} tokens are those of the dense head")

    def of_row(row: Mapping[str, Any]) -> dict[str, Any]:
        fell_back = head.counts["fell back"] + head.counts["tied"]
        rate = float(f"{fell_back / max(head.counts['screened'], 1):.3g}")
        return {**problem.of_row(row), "fallback_rate": rate, **watch.fields(row["ratio"])}

    own = {"self-dense-head": lambda: watch.generation(with_dense.ours)}
    return replace(problem, check=same, own=own, of_row=of_row)


class HeadWatch:
    """The share of a head in the time of generations, and what would be left of them without it."""

    def __init__(self) -> None:
        self.head = 0.0  # seconds since the generation began
        self.shares: dict[int, list[float]] = {}  # by threads

    def on(self, view: DecoderModel) -> DecoderModel:
        """The model with a head that is timed."""

        def head(x: Tensor) -> Tensor:
            start = perf_counter()
            found: Tensor = view.head(x)
            self.head += perf_counter() - start
            return found

        return replace(view, head=head)

    def generation(self, call: Call) -> Tensor:
        """Calls, and keeps the head's share of the time."""
        self.head, start = 0.0, perf_counter()
        found: Tensor = call()
        self.shares.setdefault(torch.get_num_threads(), []).append(self.head / (perf_counter() - start))
        return found

    def fields(self, ratio: float | None) -> dict[str, Any]:
        """The dense head's share, the gain of a head that takes no time, and how much of that was reached."""
        if ratio is None:
            return {}
        share = median(self.shares[torch.get_num_threads()])
        found = {"head_share": share, "allowed": 1 / (1 - share), "of_allowed": ratio * (1 - share)}
        return {name: float(f"{value:.4g}") for name, value in found.items()}


def of_model(
    model: Any,
    ids: Tensor,
    new: int,
    near_tie: float | None = None,
    trees: Callable[[], Sequence[DraftSource]] | None = None,
    wrap: Callable[[DecoderModel], DecoderModel] = lambda view: view,
    **choice: Any,
) -> Problem:
    """Generation of `new` tokens after each of `ids` `[batch, n]`, eos or not; by trees of the sources of `trees`.

    Every call starts with fresh sources; the cost curve is measured once. `choice` are settings of the sampling.
    """
    view = wrap(decoder_model(model))
    batch, length = ids.shape

    last: list[Any] = [None]
    curves: dict[int, CostCurve] = {}  # by threads

    def generate(draft: Any) -> Tensor:
        found: Any = scrimp.generate(view, ids, max_new_tokens=new, ignore_eos=True, draft=draft, **choice)
        return torch.tensor([completion.tokens for completion in found])

    def ours() -> Tensor:
        if trees:
            count = torch.get_num_threads()
            curve = curves[count] = curves.get(count) or CostCurve.measure(view)
            last[0] = scrimp.tree_decoding(*trees(), cost=curve)
        return generate(last[0])

    def of_row(row: Mapping[str, Any]) -> dict[str, Any]:
        def rate(which: str) -> float | None:
            return None if row[which] is None else float(f"{1e3 * batch * new / row[which]:.4g}")

        rates = {"tokens_per_s": rate("ours_ms"), "peer_tokens_per_s": rate("peer_ms")}
        return rates if last[0] is None else rates | {"tokens_per_step": float(f"{last[0].tokens_per_step:.4g}")}

    with torch.no_grad():
        part = ids[:1, :QUALITY_TOKENS]
        ratio = quality(Reader(model), part)[0].perplexity / quality(Reader(model, stock=True), part)[0].perplexity
    return Problem(
        inputs=(model, ids, new),
        ours=ours,
        check=lambda got: check(model, ids, got, NEAR_TIE[model.dtype] if near_tie is None else near_tie),
        work=work(view, batch, length, new),
        own={"self-plain": lambda: generate(None)} if trees else {},
        fields={"n": length, "profile": "tree" if trees else "plain", "perplexity_ratio": float(f"{ratio:.6g}")},
        of_row=of_row,
    )


def work(view: DecoderModel, batch: int, length: int, new: int) -> Work:
    """Every step reads all weights and every sequence's cache; the prompts are products of all their tokens."""
    weights = sum(tensor.nbytes for tensor, *_ in view.weights)
    numbers = sum(tensor.numel() for tensor, *_ in view.weights)
    token = 2 * len(view.layers) * view.kv_heads * view.head_dim * view.embedding.element_size()
    cached = batch * token * sum(range(length, length + new))
    return Work(bytes=new * weights + cached, flops=2.0 * numbers * batch * (length + new))


def at_once(model: Any, ids: Tensor, got: Tensor) -> Tensor:
    """Hugging Face's logits `[B, new, V]` before each new token."""
    logits: Tensor = model(torch.cat([ids, got], 1), use_cache=False).logits[:, ids.shape[1] - 1 : -1]
    return logits


def stepwise(model: Any, ids: Tensor, got: Tensor) -> Tensor:
    """The same, with each new token fed alone."""
    out = model(ids, use_cache=True)
    found = [out.logits[:, -1:]]
    for token in got[:, :-1].split(1, 1):
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits)
    return torch.cat(found, 1)


def check(
    model: Any, ids: Tensor, got: Tensor, near_tie: float, read: Callable[[Any, Tensor, Tensor], Tensor] = at_once
) -> None:
    """Every token is the best by Hugging Face's logits too, or as good as the best."""
    with torch.no_grad():
        logits = read(model, ids, got).float()
    behind = logits.amax(-1) - logits.gather(2, got[..., None])[..., 0]
    worst = int(behind.argmax())
    if float(behind.max()) > near_tie:
        raise AssertionError(
            f"token {worst % got.shape[1]} of sequence {worst // got.shape[1]} is {float(behind.max()):.3g} behind the "
            "best one by Hugging Face's logits"
        )


def sparse_check(model: Any, ids: Tensor, got: Tensor) -> None:
    """Tokens and logits have the bits of our ops one by one, and Hugging Face's logits agree given the same choices.

    Those are read one token after the other: several at once are read densely.
    """
    view, texts = decoder_model(model), ids.tolist()
    asked = {"max_new_tokens": got.shape[1], "ignore_eos": True}
    _, together = recorded(view, texts, None, **asked)
    with recorded_choices(model) as choices:
        found, one_by_one = recorded(view, texts, None, **asked)
    if got.tolist() != [completion.tokens for completion in found]:
        raise AssertionError("the tokens are not those of our ops one by one")
    different = sum(text not in one_by_one or not same_bits(together[text], one_by_one[text]) for text in together)
    if different:
        raise AssertionError(f"{different} of {len(together)} rows of logits differ in bits from our ops one by one")
    with replayed_choices(model, choices):
        check(model, ids, got, NEAR_TIE[FP32], stepwise)


def agreement(results: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Tokens that a peer and we have in common before the first difference, over all sequences."""
    ours, theirs = results
    same = (ours == theirs[:, : ours.shape[1]]).int().cumprod(1)
    return {"identical_tokens": int(same.sum())}
