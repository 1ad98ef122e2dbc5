"""Real parameters with real gradients, without a network: models by name, one backward pass on text."""

import re
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

import pats_kernels
from benchmarks.common.shapes import Gradients

SEED = 0
SEQUENCE = 128  # tokens
BATCH, SMALL_BATCH = 8, 2  # sequences; small for models whose activations would not fit beside them
BIG_MODEL = 400_000_000  # parameters
MASKED_SHARE = 0.15  # of the tokens, as BERT was trained
SPECIAL_TOKENS = 1000  # ids below are kept free of words: padding and the like
IGNORED = -100  # the label that transformers' losses skip


def _bert(**sizes: Any) -> dict[str, Any]:
    return {"model_type": "bert", **sizes}


def _roberta(**sizes: Any) -> dict[str, Any]:
    return {
        "model_type": "roberta",
        "vocab_size": 50265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        **sizes,
    }


def _deberta_v3(**sizes: Any) -> dict[str, Any]:
    return {
        "model_type": "deberta-v2",
        "vocab_size": 128100,
        "type_vocab_size": 0,
        "relative_attention": True,
        "position_buckets": 256,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        **sizes,
    }


def _gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {"model_type": "gpt2", "n_embd": width, "n_layer": layers, "n_head": heads}


def _qwen2(**sizes: Any) -> dict[str, Any]:
    return {"model_type": "qwen2", "vocab_size": 151936, "tie_word_embeddings": True, **sizes}


_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
_QWEN_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}

# What the configurations on the Hugging Face hub say, where it differs from transformers' defaults and
# decides a parameter's shape or whether it has a gradient.
CONFIGS: dict[str, dict[str, Any]] = {
    "bert-base-uncased": _bert(),
    "bert-large-uncased": _bert(**_LARGE),
    "roberta-base": _roberta(),
    "roberta-large": _roberta(**_LARGE),
    "microsoft/deberta-v3-base": _deberta_v3(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
    ),
    "microsoft/deberta-v3-large": _deberta_v3(**_LARGE),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "meta-llama/Llama-3.2-1B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-0.5B": _qwen2(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
    ),
    "Qwen/Qwen2.5-1.5B": _qwen2(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
    ),
    "Qwen/Qwen2.5-7B": _qwen2(**_QWEN_7B, num_hidden_layers=28),
    "Qwen/Qwen2.5-7B-2-layers": _qwen2(**_QWEN_7B, num_hidden_layers=2),  # its shapes, on a small machine
    "tiny": _bert(  # for tests
        vocab_size=1200,
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=96,
        max_position_embeddings=SEQUENCE,
    ),
}


def config(name: str) -> PretrainedConfig:
    """The configuration of a model: from the table above, by full or short name, else from a local cache.

    Raises:
        ValueError: the model is in neither; lists the known ones.
    """
    for known, values in CONFIGS.items():
        if name.lower() in (known.lower(), known.lower().rpartition("/")[2]):
            return AutoConfig.for_model(**values)
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"Unknown model: {name!r} (known offline: {', '.join(CONFIGS)})") from error


def build(name: str, device: torch.device | str) -> PreTrainedModel:
    """The model with random weights: a masked language model if there is one, else a causal one."""
    model_config = config(name)
    head = AutoModelForMaskedLM if is_masked(model_config) else AutoModelForCausalLM
    torch.manual_seed(SEED)
    with torch.device(device):
        return head.from_config(model_config)


def is_masked(model_config: PretrainedConfig) -> bool:
    """Whether the model is trained to fill in masked tokens."""
    return model_config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def gradients(name: str, text: str, device: torch.device, dtype: torch.dtype) -> Gradients:
    """Parameters and gradients after one backward pass on `text`, in `dtype`; the pass itself is float32.

    Parameters that the loss does not reach have no gradient and are left out.
    """
    model = build(name, device).train()
    count = sum(param.numel() for param in model.parameters())
    batch = SMALL_BATCH if count >= BIG_MODEL else BATCH
    tokens = token_ids(text, batch * SEQUENCE, model.config.vocab_size).view(batch, SEQUENCE).to(device)
    inputs, labels = tokens, tokens
    if is_masked(model.config):
        inputs, labels = mask(tokens)
    model(input_ids=inputs, labels=labels).loss.backward()
    reached = [param for param in model.parameters() if param.grad is not None]
    return Gradients(
        [param.detach().to(dtype).contiguous() for param in reached],
        [param.grad.to(dtype).contiguous() for param in reached if param.grad is not None],
    )


def token_ids(text: str, count: int, vocabulary: int) -> Tensor:
    """The first `count` words of `text`, repeated if it is shorter, each hashed to a token id.

    These are not a tokenizer's ids, but they have a similar distribution: frequent words are frequent rows of
    the embedding, and most rows get no gradient at all.
    """
    words = re.findall(r"\w+", text.lower())
    if not words:
        raise ValueError("Invalid text: it has no words")
    first = min(SPECIAL_TOKENS, vocabulary // 2)
    ids = [first + zlib.crc32(word.encode()) % (vocabulary - first) for word in words]
    return torch.tensor(ids).repeat(-(-count // len(ids)))[:count]


def mask(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and labels of masked language modelling: only masked tokens count in the loss."""
    generator = torch.Generator().manual_seed(SEED)
    masked = (torch.rand(tokens.shape, generator=generator) < MASKED_SHARE).to(tokens.device)
    return tokens.masked_fill(masked, SPECIAL_TOKENS // 2), tokens.masked_fill(~masked, IGNORED)


def default_text() -> str:
    """The project's README, else the package's own source."""
    package = Path(pats_kernels.__file__).parent
    readme = package.parent / "README.md"
    sources = [readme] if readme.exists() else sorted(package.glob("*.py"))
    return "\n".join(source.read_text(encoding="utf-8") for source in sources)
