"""Int4Weight: 4-bit weight matrices in one canonical form, and the files they come from."""

from .channels import Int4Channels
from .checkpoint import Int4Checkpoint, open_checkpoint, quantization_config, save_checkpoint
from .gguf import GgufFile
from .gptq_writer import save_gptq
from .weight import Int4Weight

__all__ = [
    "GgufFile",
    "Int4Channels",
    "Int4Checkpoint",
    "Int4Weight",
    "open_checkpoint",
    "quantization_config",
    "save_checkpoint",
    "save_gptq",
]
