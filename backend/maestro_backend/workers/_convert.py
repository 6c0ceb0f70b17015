"""`python -m maestro_backend.workers._convert`: makes checkpoints, in a process of its own.

`gguf FILE FOLDER` turns a GGUF file into safetensors (bfloat16) and a tokenizer; `random NAME
FOLDER` makes a Llama with random weights and a byte-level tokenizer. `hub NAME` makes nothing: it
asks the hub whether there is such a model. It runs in the engine's environment, where torch,
transformers and huggingface_hub are.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from maestro_backend.workers.vllm_plugin import hide_mismatched_packages

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_UNREACHABLE = ("ConnectError", "ConnectionError", "ProxyError")
_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


RANDOM_SHAPES: dict[str, dict[str, int]] = {
    name: {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
    }
    for name, hidden, intermediate, layers, heads, kv_heads, head in (
        ("tiny-llama", 64, 512, 2, 2, 1, 32),
        ("llama-30m", 512, 1536, 10, 8, 2, 64),
        ("llama-60m", 640, 1920, 13, 10, 2, 64),
        ("llama-110m", 768, 2304, 16, 12, 4, 64),
    )
}
"""Random models by name: the number is about their parameters."""


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


def make_random(folder: Path, name: str = "tiny-llama", seed: int = 0) -> None:
    """Write a Llama with random weights, the same ones for the same `name` and `seed`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        **RANDOM_SHAPES[name],
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


def byte_tokenizer(size: int = 0) -> Any:
    """A token for each byte; with a larger `size`, more tokens that no text is made of."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = [*alphabet, *_SPECIAL_TOKENS]
    made += [f"<|{index}|>" for index in range(len(made), size)]
    words = {token: index for index, token in enumerate(made)}
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


def hub_refusal(name: str) -> str:
    """Why an engine could not fetch `name` from its hub; "" where it could, or nobody can tell."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    for pause in (1.0, 0.0):
        try:
            get_hf_file_metadata(hf_hub_url(name, "config.json"))
        except errors.RepositoryNotFoundError:
            return "the hub has no such model, or does not show it: check the name, or set HF_TOKEN"
        except errors.HFValidationError as error:
            return str(error)
        except errors.OfflineModeIsEnabled:
            return "the model is not in the hub's cache, and HF_HUB_OFFLINE forbids to download it"
        except Exception as error:  # the HTTP client, and so its errors, depend on the version
            if type(error).__name__ not in _UNREACHABLE:
                break
            told = str(error).strip()
            time.sleep(pause)
        else:
            break
    else:
        return f"the hub cannot be reached ({told}). Without a network, give a folder as `source`"
    return ""


def main(argv: list[str]) -> int:
    """`gguf FILE FOLDER`, `random NAME FOLDER` or `hub NAME`."""
    hide_mismatched_packages()
    match argv:
        case ["gguf", gguf, folder]:
            convert_gguf(Path(gguf), Path(folder))
        case ["random", name, folder]:
            make_random(Path(folder), name)
        case ["hub", name]:
            refusal = hub_refusal(name)
            sys.stderr.write(refusal)
            return 1 if refusal else 0
        case _:
            sys.stderr.write("usage: _convert gguf FILE FOLDER | random NAME FOLDER | hub NAME\n")
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
