"""llama.cpp through its Python binding, on the same weights in a GGUF file written here (fp32, no tokenizer)."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..registry import Peer

DISTRIBUTION = "llama-cpp-python"
LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


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
        runner.reset()
        runner.eval(prompt)
        found = []
        for _ in range(new):
            found.append(int(np.argmax(runner.scores[runner.n_tokens - 1])))
            if len(found) < new:
                runner.eval(found[-1:])
        return torch.tensor([found])

    return Peer(call, same=False, fields=agreement)


@cache
def gguf_file(model: Any) -> Path:
    """The weights of a Hugging Face Llama in a file that goes with the process."""
    folder = tempfile.TemporaryDirectory()
    _kept.append(folder)
    path = Path(folder.name) / "model.gguf"
    write_gguf(model, path)
    return path


def write_gguf(model: Any, path: Path, tokens: list[str] | None = None) -> None:
    """The weights of a Hugging Face Llama in fp32 as llama.cpp reads them, with a byte-level vocabulary or none."""
    import gguf

    config = model.config
    H, G = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(H)
    writer.add_head_count_kv(G)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab" if tokens is None else "gpt2")
    if tokens is not None:
        writer.add_token_list(tokens)
        writer.add_token_scores([0.0] * len(tokens))
        writer.add_token_types([1] * len(tokens))
    for name, tensor in model.state_dict().items():
        value, module = tensor.float(), name.removesuffix(".weight")
        if module == "lm_head" and config.tie_word_embeddings:
            continue
        new = WHOLE.get(module)
        if new is None:
            _, _, layer, kind = module.split(".", 3)
            new = f"blk.{layer}.{LAYER[kind]}"
            heads = {"attn_q": H, "attn_k": G}.get(LAYER[kind])
            if heads:  # GGUF's rotary order: pairs side by side
                value = value.view(heads, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
        writer.add_tensor(f"{new}.weight", value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_kept: list[tempfile.TemporaryDirectory] = []
