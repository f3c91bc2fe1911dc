"""Many generate calls of mixed length on a tiny model: memory must stay flat, and threads must agree with one.

    python -m scrimp.benchmarks.soak --calls 5000

The suite runs a smaller number of the same calls.
"""

import argparse
import gc
import re
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from scrimp.methods.generation import DecoderModel, KVCache, decoder_model, generate, stream
from scrimp.testing import random_llama

VOCABULARY = 256
CACHES = 3  # every so many calls goes on from a cache that is kept


def tiny_model() -> DecoderModel:
    """A random two-layer Llama with a context of 1,024 tokens."""
    torch.manual_seed(0)
    return decoder_model(random_llama(VOCABULARY, max_position_embeddings=1024, eos_token_id=2, initializer_range=0.3))


def call(model: DecoderModel, number: int, cache: KVCache) -> list[list[int]]:
    """Call `number`: its prompts, lengths, settings and whether it is cancelled depend on the number alone."""
    mixed = torch.Generator().manual_seed(number)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=mixed))

    batch = 1 if number % CACHES == 0 else pick(1, 5)
    lengths = [pick(1, 600 if number % 50 == 0 else 60) for _ in range(batch)]
    prompts = [torch.randint(1, VOCABULARY, (n,), generator=mixed).tolist() for n in lengths]
    asked: dict[str, Any] = {"max_new_tokens": pick(1, 20), "temperature": float(number % 2), "seed": number}
    kept = cache if number % CACHES == 0 else None
    if number % 7 == 0:
        pieces = stream(model, prompts, cache=kept, **asked)
        tokens: list[list[int]] = [[] for _ in prompts]
        for piece, _ in zip(pieces, range(3), strict=False):
            tokens[piece.sequence].append(piece.token)
        pieces.close()  # type: ignore[attr-defined]
        return tokens
    found = generate(model, prompts, cache=kept, **asked)
    return [completion.tokens for completion in found] if isinstance(found, list) else [found.tokens]


def resident_bytes() -> int:
    """Memory of this process that is in use now; 0 where Linux's /proc is missing."""
    try:
        found = re.search(r"^VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def growth(model: DecoderModel, calls: int, warm_up: int) -> int:
    """Bytes by which `calls` calls after `warm_up` ones made the process grow."""
    cache = KVCache(model, 1, 700)
    for number in range(warm_up):
        call(model, number, cache)
    gc.collect()
    before = resident_bytes()
    for number in range(calls):
        call(model, number, cache)
    gc.collect()
    return resident_bytes() - before


def threads_agree(model: DecoderModel, calls: int, threads: int) -> bool:
    """Whether `threads` Python threads, each running all calls at once with the others, get what one gets."""
    alone = [call(model, number, KVCache(model, 1, 700)) for number in range(calls)]
    found: list[list[list[list[int]]]] = [[] for _ in range(threads)]

    def run(which: int) -> None:
        cache = KVCache(model, 1, 700)
        order = [(number + which) % calls for number in range(calls)]  # so that different calls meet
        results = {number: call(model, number, cache) for number in order}
        found[which] = [results[number] for number in range(calls)]

    workers = [threading.Thread(target=run, args=(which,)) for which in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return all(each == alone for each in found)


def main(words: Sequence[str] | None = None) -> int:
    """Runs the soak; exit status 1 where memory grows by more than 16 MiB or threads disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=5000, metavar="N")
    parser.add_argument("--threads", type=int, default=8, metavar="N")
    asked = parser.parse_args(words)
    model = tiny_model()
    grown = growth(model, asked.calls, min(asked.calls, 300)) / 2**20
    print(f"{asked.calls} calls: memory grew by {grown:.1f} MiB")
    agree = threads_agree(model, max(1, asked.calls // 50), asked.threads)
    verdict = "the same tokens" if agree else "DIFFERENT tokens"
    print(f"{asked.threads} threads, {max(1, asked.calls // 50)} calls each: {verdict}")
    return 0 if grown <= 16 and agree else 1


if __name__ == "__main__":
    sys.exit(main())
