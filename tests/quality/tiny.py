"""A random model with a tokenizer, small enough to compile and decode in seconds."""

import pydoc_data.topics

import tokenizers
import torch
import transformers

HEADS, HEAD_DIM, LAYERS = 2, 32, 2


def config(**changes):
    sizes = {
        "vocab_size": 260,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2 * HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 512,
    }
    return transformers.LlamaConfig(**sizes | changes)


def model(cls=transformers.LlamaForCausalLM, configuration=None):
    torch.manual_seed(0)
    return cls(config() if configuration is None else configuration).eval()


def tokenizer():
    """One token for each byte."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(tokenizers.models.BPE({letter: at for at, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core)


def save(folder):
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def prose(characters=6000):
    return " ".join(pydoc_data.topics.topics.values())[:characters]
