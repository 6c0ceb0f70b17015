"""`python -m maestro_backend.workers._convert`: makes checkpoints, in a process of its own.

`gguf FILE FOLDER` turns a GGUF file into safetensors (bfloat16) and a tokenizer; `random FOLDER`
makes a tiny Llama with random weights and a byte-level tokenizer. It runs in the engine's
environment, where torch and transformers are.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from maestro_backend.workers.vllm_plugin import hide_mismatched_packages

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write `gguf` as a safetensors checkpoint into `folder`; its chat template comes along."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer: Any = AutoTokenizer.from_pretrained(**source)
    model: Any = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_random(folder: Path, seed: int = 0) -> None:
    """Write a Llama of 2 layers with random weights, the same ones for the same `seed`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=8192,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|im_start|>"),
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(config)
    _prefer_printable(model, tokenizer)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _prefer_printable(model: Any, tokenizer: Any) -> None:
    """Make it write visible ASCII: with random bytes it would loop on a grammar's whitespace.

    Every embedding gets the same large first component, so the last hidden state has it too, and
    the head's first column becomes a bias for each token.
    """
    import torch

    visible = [tokenizer.convert_tokens_to_ids(chr(code)) for code in range(33, 127)]
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[:, 0] = -1.0
        model.lm_head.weight[[*visible, tokenizer.eos_token_id], 0] = 0.0


def _byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {token: index for index, token in enumerate([*alphabet, *_SPECIAL_TOKENS])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def main(argv: list[str]) -> int:
    """`gguf FILE FOLDER` or `random FOLDER`."""
    hide_mismatched_packages()
    match argv:
        case ["gguf", gguf, folder]:
            convert_gguf(Path(gguf), Path(folder))
        case ["random", folder]:
            make_random(Path(folder))
        case _:
            sys.stderr.write("usage: _convert gguf FILE FOLDER | random FOLDER\n")
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
