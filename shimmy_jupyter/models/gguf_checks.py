"""What makes llama.cpp 0c1e57098 end the process, looked for in a header before it is loaded.

Each rule stands for an assertion of llama.cpp's, or an exception that leaves it through C, and was seen
to do so. What llama.cpp refuses by itself is left to it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import GgufError
from .gguf import (
    AdapterFacts,
    ArrayInfo,
    GgufFacts,
    Header,
    TensorInfo,
    facts_of,
    shown,
    spread,
    within,
)
from .gguf_reader import MAX_TENSORS, read
from .gguf_vocabulary import Words, check_vocabulary

_ARCHITECTURE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_PART = re.compile(r"(?P<stem>.*)-00001-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE)
_MOST_PARTS = 1024
_MOST_LAYERS, _MOST_EXPERTS = 512, 1024  # LLAMA_MAX_LAYERS, LLAMA_MAX_EXPERTS
_MAPPED_ALIGNMENT = 32  # TENSOR_ALIGNMENT

_RANGES = {
    "context_length": (1, (1 << 31) - 1),
    "embedding_length": (1, 1 << 20),
    "attention.head_count": (0, 1 << 16),
    "attention.head_count_kv": (0, 1 << 16),
    "attention.key_length": (0, 1 << 16),
    "attention.value_length": (0, 1 << 16),
    "rope.dimension_count": (0, 1 << 16),
    "expert_count": (0, _MOST_EXPERTS),
    "expert_used_count": (0, _MOST_EXPERTS),
    "pooling_type": (0, 4),
}
_EPSILONS = (
    "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon",
    "attention.group_norm_epsilon",
)  # fmt: skip
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")

_WHOLE_HEADS = frozenset(
    """
    apertus arcee arctic baichuan chameleon codeshell cogvlm dbrx deci deepseek dots1 dream ernie4_5
    ernie4_5-moe exaone falcon granite granitemoe grok grovemoe hunyuan-dense hunyuan-moe hy_v3
    internlm2 jais2 llada llada-moe llama llama-embed llama4 maincoder mellum mistral3 olmo olmo2
    olmoe orion paddleocr pangu-embedded plamo qwen2 qwen2moe qwen2vl qwen3 qwen3moe qwen3vl
    qwen3vlmoe rnd1 seed_oss smallthinker smollm3 starcoder2 xverse
    """.split()
)
"""Architectures whose keys, values and rotated dimensions must be equally many."""
_EQUAL_HEADS = _WHOLE_HEADS | frozenset(
    """
    afmoe bailingmoe2 bert bitnet bloom chatglm cohere2 command-r eurobert glm4 glm4moe gpt2 gptneox
    granitehybrid jais jina-bert-v2 jina-bert-v3 laguna minimax-m2 modern-bert mpt nemotron nemotron_h
    nemotron_h_moe neo-bert nomic-bert nomic-bert-moe openelm phi2 phi3 qwen qwen35 qwen35moe
    qwen3next refact stablelm starcoder t5 t5encoder
    """.split()
)
"""Those whose keys and values must."""
_PLAIN_ATTENTION = _EQUAL_HEADS - {"laguna", "qwen35", "qwen35moe", "qwen3next"}
"""Those whose projections have a row for each element of each head, and for nothing else."""
_PROJECTION = re.compile(r"blk\.(\d+)\.attn_(q|k|v|qkv|output)\.weight")
_OTHER_OUTPUTS = ("deepseek4", "gemma4-assistant", "qwen4exp", "wavtokenizer-dec")
_ONE_EXPERT_IS_NONE = ("hunyuan-dense", "hunyuan_vl")

_NOT_COMPUTED = {"F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K"}
_COMPUTED = re.compile(
    r"(token_embd|position_embd|token_types|output|cls|blk\.\d+)(?!.*tid2eid)[\w.]*\.(weight|bias)"
)
_ONLY_F32 = re.compile(r".*(norm\.weight|\.bias|token_types\.weight|ssm_(conv1d\.weight|a|d))")
"""Added or multiplied with, for which llama.cpp's processor code takes nothing else."""
_LORA = re.compile(r"(.+)\.lora_([ab])")


def checked(path: Path, files: Sequence[Path] = ()) -> GgufFacts:
    """As `gguf.validate`."""
    words = Words()
    header = read(path, words)
    _check_kinds(header)
    if number := header.number("split.no"):
        raise GgufError(f"it is part {number + 1} of a model, which is loaded by its first part")
    kind = _kind(header)
    if kind == "adapter":
        return facts_of(kind, [header], words.count, _adapter(header))
    parts = [header, *_other_parts(path, header, files)]
    if kind != "projector":
        _check_model(parts, words, path)
        kind = "embedding" if _embeds(header) else "model"
    return facts_of(kind, parts, words.count, None)


def _kind(header: Header) -> str:
    said = header.metadata.get("general.type", "model")
    arch = header.text("general.architecture")
    if not arch:
        raise GgufError("general.architecture is missing")
    if not _ARCHITECTURE.fullmatch(arch):  # it is part of other keys, which are shown
        raise GgufError(f"general.architecture {shown(arch)} is no architecture's name")
    if said == "adapter":
        return "adapter"
    if said in {"mmproj", "projector"} or header.text("general.architecture") == "clip":
        return "projector"
    if said == "imatrix":
        raise GgufError("general.type 'imatrix' is neither model, adapter nor projector")
    return "model"


def _embeds(header: Header) -> bool:
    """What sees a text as a whole cannot continue it."""
    arch = header.text("general.architecture")
    return header.metadata.get(f"{arch}.attention.causal") is False or "bert" in arch


def _check_kinds(header: Header) -> None:
    """Of what llama.cpp reads without looking at its type."""
    for key, kind in (
        ("general.type", "string"),
        ("general.architecture", "string"),
        ("adapter.type", "string"),
        ("adapter.lora.alpha", "float32"),
        ("split.no", "uint16"),
    ):
        if (found := header.kinds.get(key, kind)) != kind:
            raise GgufError(f"{key} is {found}, not {kind}")


# Values


def _integer(header: Header, key: str) -> None:
    kind = header.kinds.get(key, "uint32")
    if "int" not in kind:
        raise GgufError(f"{key} is {kind}, not an integer")
    if isinstance(value := header.metadata.get(key), ArrayInfo):
        raise GgufError(f"{key} has {value.count} items, or comes after too many others")


# Parts


def _other_parts(path: Path, header: Header, files: Sequence[Path]) -> list[Header]:
    count = header.number("split.count")
    if count <= 1:
        if len(files) > 1:
            raise GgufError(f"it is whole by its header, and one of {len(files)} by its name")
        return []
    within("split.count", count, 1, _MOST_PARTS)
    if len(files) > 1:
        others = files[1:]
        if len(files) != count:
            raise GgufError(f"split.count {count} does not fit its {len(files)} files")
    else:
        others = _named_parts(path, count)
    parts, tensors = [], len(header.tensors)
    for i, file in enumerate(others, 1):
        parts.append(_part(file, i))
        tensors += len(parts[-1].tensors)
        within("the number of tensors in all parts", tensors, 0, MAX_TENSORS)
    return parts


def _named_parts(path: Path, count: int) -> list[Path]:
    name = _PART.fullmatch(path.name)
    if name is None or int(name["count"]) != count:
        raise GgufError(
            f"split.count {count} does not fit the file's name, which should end in "
            f"-00001-of-{count:05}.gguf"
        )
    return [
        path.with_name(f"{name['stem']}-{number:05}-of-{count:05}{name['suffix']}")
        for number in range(2, count + 1)
    ]


def _part(path: Path, index: int) -> Header:
    try:
        header = read(path, None)
        _check_kinds(header)
    except GgufError as error:
        raise GgufError(f"part {index + 1}: {error.message}") from None
    if (number := header.metadata.get("split.no")) != index:
        raise GgufError(f"part {index + 1}: split.no {shown(number)} is not {index}")
    # What they say of themselves is not asked again, and could add up.
    return replace(header, metadata={}, kinds={})


# Models


def _check_model(parts: list[Header], words: Words, path: Path) -> None:
    header = parts[0]
    arch = header.text("general.architecture")
    _check_ranges(header, arch)
    _check_floats(header, arch)
    _check_heads(header, arch)
    _check_experts(parts, arch)
    check_vocabulary(header, words, lambda again: read(path, again), encoder=_embeds(header))
    _check_tensors(parts)
    _check_output(parts, arch)
    if arch in _PLAIN_ATTENTION:
        _check_projections(parts, arch)


def _check_ranges(header: Header, arch: str) -> None:
    key = f"{arch}.block_count"
    if key not in header.metadata:
        raise GgufError(f"{key} is missing")
    _integer(header, key)
    layers = header.number(key)
    within(key, layers, 1, _MOST_LAYERS)
    for name, (low, high) in {**_RANGES, "nextn_predict_layers": (0, layers)}.items():
        key = f"{arch}.{name}"
        _integer(header, key)
        for value in header.numbers(key):
            within(key, value, low, high)
    key = f"{arch}.rope.scaling.type"
    scaling = header.metadata.get(key, "none")
    if scaling not in _ROPE_SCALINGS:
        raise GgufError(f"{key} {shown(scaling)} is none of {', '.join(_ROPE_SCALINGS)}")


def _check_output(parts: list[Header], arch: str) -> None:
    """Vectors are read in this width, whatever the last layer's is."""
    header, key = parts[0], f"{arch}.embedding_length_out"
    _integer(header, key)
    width, most = header.number(key), header.number(f"{arch}.embedding_length")
    if arch in _OTHER_OUTPUTS or width <= most:
        return
    tensors = (tensor for part in parts for tensor in part.tensors)
    if not any(one.name.startswith("dense_2") and width in one.shape for one in tensors):
        raise GgufError(f"{key} {width} is more than embedding_length {most}")


def _check_floats(header: Header, arch: str) -> None:
    for key, value in header.metadata.items():
        if isinstance(value, float) and key.startswith(f"{arch}.") and not math.isfinite(value):
            raise GgufError(f"{key} {value} is no finite number")
    for name in _EPSILONS:
        value = header.metadata.get(f"{arch}.{name}", 0.0)
        if isinstance(value, float) and not 0 <= value <= 1:
            raise GgufError(f"{arch}.{name} {value:g} is outside 0…1")


def _check_heads(header: Header, arch: str) -> None:
    prefix = f"{arch}.attention"
    heads = header.numbers(f"{prefix}.head_count")
    kv_heads = header.numbers(f"{prefix}.head_count_kv")
    width = max(len(heads), len(kv_heads))
    for one, kv in zip(spread(heads, width), spread(kv_heads, width), strict=False):
        if one and kv and one % kv:
            raise GgufError(f"{prefix}.head_count_kv {kv} does not divide head_count {one}")
    if not heads or not heads[0] or any(key.endswith("_swa") for key in header.metadata):
        return
    usual = header.number(f"{arch}.embedding_length") // heads[0]
    keys = header.number(f"{prefix}.key_length", usual)
    values = header.number(f"{prefix}.value_length", usual)
    rotated = header.number(f"{arch}.rope.dimension_count", keys)
    if arch in _EQUAL_HEADS and keys != values:
        raise GgufError(f"{prefix}.value_length {values} is not key_length {keys}")
    if rotated > keys or rotated % 2 or (arch in _WHOLE_HEADS and rotated != keys):
        most = f"{keys}" if arch in _WHOLE_HEADS else f"an even number within 0…{keys}"
        raise GgufError(f"{arch}.rope.dimension_count {rotated} is not {most}")


def _check_projections(parts: list[Header], arch: str) -> None:
    """llama.cpp compares some of them with the first layer only, or with the model's width."""
    header, prefix = parts[0], f"{arch}.attention"
    heads = header.numbers(f"{prefix}.head_count")
    if not heads or not heads[0] or any(key.endswith("_swa") for key in header.metadata):
        return
    kv_heads = header.numbers(f"{prefix}.head_count_kv") or heads
    width = header.number(f"{arch}.embedding_length") // heads[0]
    key = header.number(f"{prefix}.key_length", width)
    value = header.number(f"{prefix}.value_length", width)
    layers = header.number(f"{arch}.block_count")
    for tensor in (tensor for part in parts for tensor in part.tensors):
        match = _PROJECTION.fullmatch(tensor.name)
        layer = int(match[1]) if match else layers
        if match is None or layer >= layers or len(tensor.shape) < 2:
            continue
        one, kv = (spread(some, layers)[layer : layer + 1] for some in (heads, kv_heads))
        if not one or not kv:
            continue
        wanted = {
            "q": one[0] * key,
            "k": kv[0] * key,
            "v": kv[0] * value,
            "qkv": one[0] * key + kv[0] * (key + value),
            "output": one[0] * value,
        }[match[2]]
        found = tensor.shape[match[2] != "output"]
        if found != wanted:
            raise GgufError(
                f"the tensor {shown(tensor.name)} is for {found} elements, but {prefix}.head_count "
                f"{one[0]} and head_count_kv {kv[0]} make {wanted}"
            )


def _check_experts(parts: list[Header], arch: str) -> None:
    header = parts[0]
    count, used, groups, groups_used = (
        header.number(f"{arch}.{name}")
        for name in ("expert_count", "expert_used_count", "expert_group_count", "expert_group_used_count")
    )  # fmt: skip
    if arch in _ONE_EXPERT_IS_NONE and count <= 1:
        count = used = 0
    within(f"{arch}.expert_used_count", used, 1 if count else 0, count)
    within(f"{arch}.expert_group_count", groups, 0, max(0, count - 1))
    if groups > 1:
        if count % groups:
            raise GgufError(
                f"{arch}.expert_group_count {groups} does not divide expert_count {count}"
            )
        within(f"{arch}.expert_group_used_count", groups_used, 1, groups - 1)
    names = (tensor.name for part in parts for tensor in part.tensors)
    if count and not any("exp" in name or "gate_inp" in name for name in names):
        raise GgufError(f"{arch}.expert_count {count}, but no tensor is an expert's")


# Tensors


def _check_tensors(parts: list[Header]) -> None:
    names: set[str] = set()
    for part in parts:
        if part.tensors and part.data_start % _MAPPED_ALIGNMENT:
            raise GgufError(
                f"general.alignment {part.alignment} lets the tensors begin at byte {part.data_start}, "
                f"which is no multiple of {_MAPPED_ALIGNMENT}"
            )
        for tensor in part.tensors:
            _check_type(tensor)
            if tensor.name in names:
                raise GgufError(f"the tensor {shown(tensor.name)} is there twice")
            names.add(tensor.name)
    if not names:
        raise GgufError("the file has no tensors")


def _check_type(tensor: TensorInfo) -> None:
    if tensor.type in _NOT_COMPUTED and _COMPUTED.fullmatch(tensor.name):
        raise GgufError(
            f"the tensor {shown(tensor.name)} is {tensor.type}, which is not computed with"
        )
    if tensor.type != "F32" and _ONLY_F32.fullmatch(tensor.name):
        raise GgufError(f"the tensor {shown(tensor.name)} is {tensor.type}, not F32")


def _adapter(header: Header) -> AdapterFacts:
    alpha = header.metadata.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise GgufError(f"adapter.lora.alpha {alpha} is no finite number")
    pairs: dict[str, dict[str, TensorInfo]] = {}
    for tensor in header.tensors:
        if match := _LORA.fullmatch(tensor.name):
            pairs.setdefault(match[1], {})[match[2]] = tensor
            if tensor.type in _NOT_COMPUTED:
                raise GgufError(
                    f"the tensor {shown(tensor.name)} is {tensor.type}, which is not computed with"
                )
    ranks = {0}
    for name, pair in pairs.items():
        if set(pair) != {"a", "b"}:
            raise GgufError(f"the adapter has only one of two tensors for {shown(name)}")
        a, b = (_padded(pair[side].shape) for side in "ab")
        # An embedding's are the other way round.
        if not name.endswith("token_embd.weight") and (a[1] != b[0] or a[2:] != b[2:]):
            raise GgufError(f"the adapter's tensors for {shown(name)} do not fit each other")
        ranks.add(b[0])
    bases = (header.metadata.get(f"general.base_model.{i}.name") for i in range(16))
    return AdapterFacts(
        header.text("adapter.type"),
        alpha,
        max(ranks),
        tuple(base for base in bases if isinstance(base, str)),
    )


def _padded(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape, 1, 1, 1, 1)[:4]
