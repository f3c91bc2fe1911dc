"""Seeds every test and poisons fresh memory, so that an element no kernel wrote shows as NaN."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

# Read when triton is imported. Without a GPU its kernels run in the interpreter; PTX comes from a subprocess.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("scrimp", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("scrimp")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "subprocess: starts Python processes of its own (not under sanitizers)")
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def _seed_and_poison() -> Iterator[None]:
    """Deterministic mode fills torch.empty with NaN (floats) or the largest value (integers)."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """One token a byte."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
    made.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[/]{% endfor %}[assistant]"
    return made
