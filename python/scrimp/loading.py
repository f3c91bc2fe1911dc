"""scrimp.load: a model and its tokenizer from a folder (of 4-bit weights too), a GGUF file or the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

NETWORK_TIMEOUT_S = 5

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(
    source: str | Path, dtype: torch.dtype | str = torch.float32, *, mode: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model for inference, with torch's own attention (SDPA), and its tokenizer. No code of the source is run.

    A folder of 4-bit weights (scrimp's own, GPTQ, AWQ or compressed-tensors) keeps them packed, to the bit; nothing of
    the producers' packages is needed. So does a .gguf file of a Llama, Mistral, Qwen2 or Qwen3 with its Q4_0, Q4_1 and
    Q8_0 matrices; its embedding and its other types, and files of other models, become `dtype`.

    Args:
        source: a folder that transformers can load, a .gguf file, or OWNER/MODEL on the Hugging Face Hub.
        dtype: of the weights that are not 4-bit; "auto" for that of the file.
        mode: arithmetic of 4-bit layers, "exact" or "int8"; by default what the folder says, else "exact".

    Raises:
        ValueError: there is no such folder or file, 4-bit files are damaged, or a mode for a model that has none.
        OSError: what is there, or on the Hub, is not such a model, or the Hub cannot be reached.
        RuntimeError: a package that this needs is missing.

    Example:
        model, tokenizer = scrimp.load("my-model")
        scrimp.generate(model, "Once upon a time", tokenizer, max_new_tokens=50).text
    """
    path = Path(source).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        with path.open("rb") as file:
            if (magic := file.read(4)) != b"GGUF":
                raise OSError(f"{path} is not a GGUF file: it begins with {magic!r}")
        return _from_gguf(path, dtype, mode)
    if (path / "config.json").is_file():
        if _is_quantized(path):
            from .integrations import quantizer

            return quantizer.load(path, dtype=dtype, mode=mode), _tokenizer(path)
        if mode is not None:
            raise ValueError(f"load: mode={mode!r} is for models of 4-bit weights, and {source} has none")
        return _from_pretrained(path, dtype)
    if isinstance(source, Path) or path.exists():
        raise ValueError(f"{source} is not the folder of a transformers model: it has no config.json")
    name = str(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"there is no folder {name} (and a name on the Hugging Face Hub is written OWNER/MODEL)")
    try:
        return _from_pretrained(name, dtype, local_files_only=True)
    except OSError:
        _ask_hub(name)
    return _from_pretrained(name, dtype)


def _from_gguf(path: Path, dtype: torch.dtype | str, mode: str | None) -> Any:
    from .int4_weight import GgufFile

    file = GgufFile(path)  # checks the header
    _need_transformers()
    from .integrations import gguf_model

    if gguf_model.is_packed(file):
        return gguf_model.load(file, dtype, mode), _tokenizer(path.parent, gguf_file=path.name)
    if mode is not None:
        raise ValueError(f"load: mode={mode!r} is for models of 4-bit weights, and {path} has none that stay packed")
    return _from_pretrained(path.parent, dtype, gguf_file=path.name)


def _ask_hub(name: str) -> None:
    """Raises OSError at once where transformers would try again for a minute."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=NETWORK_TIMEOUT_S)
    except Exception as error:  # the Hub client's network errors have no base class of its own
        raise OSError(f"{name}: no such folder here, and not from the Hub: {_first_line(error)}") from error


def _need_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise RuntimeError(f"loading a model needs transformers ({error}): pip install 'transformers>=5'") from error


def _is_quantized(folder: Path) -> bool:
    from .int4_weight.checkpoint import quantization_config

    return quantization_config(folder) is not None


def _tokenizer(source: str | Path, **options: Any) -> Any:
    from transformers import AutoTokenizer

    with quiet():
        return AutoTokenizer.from_pretrained(source, **options)


def _from_pretrained(source: str | Path, dtype: torch.dtype | str, **options: Any) -> Any:
    _need_transformers()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="sdpa", **options)
        except ImportError as error:
            raise RuntimeError(f"loading {source} needs another package: {_first_line(error)}") from error
    return without_quantizer(model).eval(), tokenizer


def without_quantizer(model: Any) -> Any:
    """The model, forgetting that its weights came from a quantised GGUF file: they no longer are."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and "gguf" in type(quantizer).__name__.lower():
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of transformers inside the block."""
    from transformers.utils import logging

    noisy = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if noisy:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
