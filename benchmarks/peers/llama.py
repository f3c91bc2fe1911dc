"""llama.cpp through its Python binding, on the same weights in a GGUF file written here (fp32, no tokenizer)."""

import tempfile
from collections.abc import Callable
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scrimp.integrations import gguf_names

from ..registry import Peer

DISTRIBUTION = "llama-cpp-python"
LAYER, WHOLE = ({new: old for old, new in names.items()} for names in (gguf_names.LAYER, gguf_names.WHOLE))


def available() -> str | None:
    """The binding compiles llama.cpp when it is installed."""
    try:
        import gguf  # noqa: F401
        import llama_cpp  # noqa: F401
    except ImportError as error:
        return f"{error.name} is not installed; pip install llama-cpp-python gguf (compiles llama.cpp, some minutes)"
    return None


def e2e(model: Any, ids: Tensor, new: int) -> Peer:
    """Greedy generation after one prompt, with as many threads as torch has."""
    import llama_cpp

    from ..e2e import agreement

    if ids.shape[0] != 1 or model.config.model_type != "llama":
        raise ValueError(f"llama.cpp is compared on one sequence of a Llama, not {list(ids.shape)}")
    file = gguf_file(model)
    threads = torch.get_num_threads()
    room = ids.shape[1] + new
    runner = llama_cpp.Llama(
        str(file),
        n_ctx=room,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
        logits_all=False,
        n_gpu_layers=0,
    )
    prompt = ids[0].tolist()

    def call() -> Tensor:
        runner.reset()  # otherwise it keeps what it knows of the same prompt
        tokens = runner.generate(prompt, temp=0.0, repeat_penalty=1.0)
        return torch.tensor([list(islice(tokens, new))])

    return Peer(call, same=False, fields=agreement)


@cache
def gguf_file(model: Any) -> Path:
    """The weights of a Hugging Face Llama in a file that goes with the process."""
    folder = tempfile.TemporaryDirectory()
    _kept.append(folder)
    path = Path(folder.name) / "model.gguf"
    write_gguf(model, path)
    return path


def write_gguf(
    model: Any, path: Path, tokens: list[str] | None = None, kind: Callable[[str], str] = lambda name: "F32"
) -> None:
    """The weights of a Hugging Face Llama, Qwen2 or Qwen3 as llama.cpp reads them.

    Args:
        model: whose weights are written.
        path: the file.
        tokens: a byte-level vocabulary, or none.
        kind: the type in which a tensor of this GGUF name is stored: F32, or what the gguf package can quantize to.
    """
    import gguf

    config = model.config
    H, G = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(H)
    writer.add_head_count_kv(G)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(model.model.layers[0].self_attn.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab" if tokens is None else "gpt2")
    if tokens is not None:
        writer.add_token_list(tokens)
        writer.add_token_scores([0.0] * len(tokens))
        writer.add_token_types([1] * len(tokens))
    for name, tensor in model.state_dict().items():
        value, (module, _, part) = tensor.float(), name.rpartition(".")
        if module == "lm_head" and config.tie_word_embeddings:
            continue
        new = WHOLE.get(module)
        if new is None:
            _, _, layer, inside = module.split(".", 3)
            new = f"blk.{layer}.{LAYER[inside]}"
            heads = {"attn_q": H, "attn_k": G}.get(LAYER[inside])
            if heads and config.model_type == "llama":  # GGUF's rotary order of this family: pairs side by side
                value = value.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(value.shape)
        stored, content = gguf.GGMLQuantizationType[kind(f"{new}.{part}")], value.contiguous().numpy()
        if stored != gguf.GGMLQuantizationType.F32:
            content = gguf.quants.quantize(content, stored)
        writer.add_tensor(f"{new}.{part}", content, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_kept: list[tempfile.TemporaryDirectory] = []
