"""Greedy tokens beside Hugging Face's own: mismatches are counted, and each is shown to be a near-tie or not.

    python -m scrimp.benchmarks.agreement demo --prompts 20 --new-tokens 128

Other kernels round differently, so two correct programs may choose differently where the two best logits are closer
than their rounding errors. For the first mismatch of each prompt this prints how far Hugging Face's logits put our
token behind its own, and the errors of both programs' logits there against float64.
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import scrimp
from scrimp.demo import text
from scrimp.demo.model import named_model
from scrimp.methods.generation import KVCache, decoder_model, forward

NEAR = 3.0  # our error may be so many times Hugging Face's own


@dataclass(frozen=True)
class Mismatch:
    """The first token that differs.

    Attributes:
        prompt: its number.
        at: new tokens before it.
        ours: our token.
        theirs: Hugging Face's.
        margin: by how much Hugging Face's logits prefer its token.
        our_error: largest error of our logits at this position, against float64.
        their_error: the same of Hugging Face's.
    """

    prompt: int
    at: int
    ours: int
    theirs: int
    margin: float
    our_error: float
    their_error: float

    @property
    def near_tie(self) -> bool:
        """The margin is within both errors, and ours is one of rounding."""
        return self.margin <= self.our_error + self.their_error and self.our_error <= NEAR * self.their_error


def compare(model: Any, exact: Any, prompts: Sequence[list[int]], new: int, step: Any = lambda: None) -> list[Mismatch]:
    """Generates `new` tokens after every prompt with both programs; the first mismatch of each prompt that has one.

    Args:
        model: a Hugging Face model that the decoding loop runs.
        exact: the same model in float64.
        prompts: token ids.
        new: tokens to generate, past eos.
        step: called after each prompt.
    """
    found = []
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        options = {
            "max_new_tokens": new,
            "do_sample": False,
            "eos_token_id": model.config.vocab_size,
            "pad_token_id": 0,
        }
        theirs = model.generate(ids, **options)[0, len(prompt) :].tolist()
        answer: Any = scrimp.generate(model, prompt, max_new_tokens=new, ignore_eos=True)
        ours = answer.tokens
        if ours != theirs:
            at = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
            found.append(_mismatch(model, exact, number, prompt + ours[:at], len(prompt), at, ours[at], theirs[at]))
        step()
    return found


@torch.no_grad()
def _mismatch(
    model: Any, exact: Any, number: int, tokens: list[int], length: int, at: int, ours: int, theirs: int
) -> Mismatch:
    ids = torch.tensor([tokens])
    stock = model(ids[:, :length], use_cache=True)
    for i in range(length, len(tokens)):  # as generate computed them, token by token
        stock = model(ids[:, i : i + 1], past_key_values=stock.past_key_values)
    their_logits = stock.logits[0, -1].double()
    truth = exact(ids, use_cache=False).logits[0, -1]
    our_logits = _ours(model, tokens, length)
    return Mismatch(
        prompt=number,
        at=at,
        ours=ours,
        theirs=theirs,
        margin=float(their_logits[theirs] - their_logits[ours]),
        our_error=float((our_logits - truth).abs().max()),
        their_error=float((their_logits - truth).abs().max()),
    )


def _ours(model: Any, tokens: list[int], length: int) -> Tensor:
    """Our logits after `tokens`, of which the first `length` were the prompt."""
    view = decoder_model(model)
    cache = KVCache(view, 1, len(tokens))
    state = forward.prefill(cache, 0, tokens[:length], panels=True, patterns=None)
    with torch.inference_mode():
        for first, end in forward.spans(length, 0, len(tokens)):
            state = forward.advance(cache, 0, torch.tensor([tokens[first:end]]), first, False)
        return forward.logits(view, state[:, -1:])[0, 0].double().clone()  # type: ignore[index]


def main(words: Sequence[str] | None = None) -> int:
    """Runs the comparison; exit status 1 where a mismatch is not a near-tie."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="what scrimp.load takes, or 'demo'")
    parser.add_argument("--prompts", type=int, default=20, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=128, metavar="N")
    asked = parser.parse_args(words)
    model, tokenizer = scrimp.load(named_model(asked.model))
    exact = copy.deepcopy(model).double()
    windows = text.windows(tokenizer, 640, "heldout", asked.prompts).tolist()
    prompts = [window[: 16 + 31 * i % 600] for i, window in enumerate(windows)]
    with tqdm(total=len(prompts), unit="prompt", disable=None) as bar:
        found = compare(model, exact, prompts, asked.new_tokens, bar.update)
    print(f"{len(prompts) - len(found)} of {len(prompts)} prompts give the same {asked.new_tokens} tokens")
    for each in found:
        verdict = "near-tie" if each.near_tie else "NOT a near-tie"
        print(
            f"prompt {each.prompt}, new token {each.at}: ours {each.ours}, theirs {each.theirs}, {verdict}: "
            f"margin {each.margin:.2e}, our error {each.our_error:.2e}, theirs {each.their_error:.2e}"
        )
    return 0 if all(each.near_tie for each in found) else 1


if __name__ == "__main__":
    sys.exit(main())
