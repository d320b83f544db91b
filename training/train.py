"""Train the bundled `self-test` model from nothing, on the CPU, and write it as a GGUF.

    python training/train.py --out shimmy_jupyter/bundled

A llama-architecture decoder (RMSNorm, interleaved rotary embedding, SwiGLU, tied embeddings) with a
byte-level BPE vocabulary, both learnt from `corpus.py`'s questions and answers. Loss is taken on the
answers only. Chats are packed back to back into fixed-length rows, so the model also sees
earlier turns in its context, as it will in a notebook.

Needs torch, tokenizers, numpy and gguf. Progress is one line every 50 steps.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
import corpus

EOS, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    layers: int = 6
    width: int = 192
    heads: int = 6
    hidden: int = 512
    vocabulary: int = 2048
    context: int = 1024
    rope_base: float = 10000.0
    epsilon: float = 1e-5


@dataclass(frozen=True)
class Recipe:
    steps: int = 2000
    rows: int = 48
    row_tokens: int = 128
    peak_rate: float = 2.5e-3
    warmup: int = 100
    weight_decay: float = 0.01
    seed: int = 20261120


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.q, self.k, self.v, self.o = (
            nn.Linear(shape.width, shape.width, bias=False) for _ in range(4)
        )

    def forward(self, x, cos, sin):
        rows, length, width = x.shape

        def split(t):
            return t.view(rows, length, self.heads, -1).transpose(1, 2)

        q, k, v = rotate(split(self.q(x)), cos, sin), rotate(split(self.k(x)), cos, sin), self.v(x)
        y = F.scaled_dot_product_attention(q, k, split(v), is_causal=True)
        return self.o(y.transpose(1, 2).reshape(rows, length, width))


def rotate(x, cos, sin):
    """Rotary embedding on interleaved pairs (x0, x1), (x2, x3) …, llama.cpp's NORM layout."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(shape.width, eps=shape.epsilon)
        self.attention = Attention(shape)
        self.norm2 = nn.RMSNorm(shape.width, eps=shape.epsilon)
        self.gate = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.norm1(x), cos, sin)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=shape.epsilon)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)
        for block in self.blocks:
            for out in (block.attention.o, block.down):
                nn.init.normal_(out.weight, std=0.02 / math.sqrt(2 * shape.layers))

    def forward(self, tokens):
        half = self.shape.width // self.shape.heads // 2
        rates = self.shape.rope_base ** (-torch.arange(half) / half)
        angles = torch.arange(tokens.shape[1])[:, None] * rates[None, :]
        cos, sin = angles.cos(), angles.sin()
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.norm(x)


class Chats:
    """An endless, seeded stream of packed training rows."""

    def __init__(self, pairs: dict[str, str], tokenizer: Tokenizer, seed: int) -> None:
        self.pairs, self.tokenizer, self.random = pairs, tokenizer, random.Random(seed)
        self.names: list[str] = []
        self.buffer: list[tuple[int, bool]] = []
        self.cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.tokenizer.encode(text).ids
        return self.cache[text]

    def question(self) -> tuple[str, str]:
        pick = self.random.random()
        if pick < 0.01:
            return self.random.choice(list(corpus.ABOUT.items()))
        if pick < 0.05:
            w, v = self.random.sample(corpus.WORDS, 2)
            return self.random.choice(corpus.OFF_TOPIC).format(w=w, v=v), corpus.UNKNOWN
        if not self.names:
            self.names = list(self.pairs)
            self.random.shuffle(self.names)
        name = self.names.pop()
        return self.random.choice(corpus.QUESTIONS).format(n=name), self.pairs[name]

    def turn(self) -> list[tuple[int, bool]]:
        asked, answer = self.question()
        head = self.encode(START + "user\n") + self.encode(asked) + self.encode(END + "\n")
        head += self.encode(START + "assistant\n")
        if self.random.random() < 0.05:
            system = "You are a helpful assistant."
            head = self.encode(START + "system\n" + system + END + "\n") + head
        tail = self.encode(answer) + self.encode(END)
        return (
            [(t, False) for t in head]
            + [(t, True) for t in tail]
            + [(t, False) for t in self.encode("\n")]
        )

    def row(self, length: int) -> list[tuple[int, bool]]:
        """`length + 1` tokens starting at a chat's start; what does not fit is dropped whole."""
        tokens: list[tuple[int, bool]] = []
        while len(tokens) <= length:
            self.buffer = self.buffer or self.turn()
            if len(tokens) + len(self.buffer) > length + 1 and tokens:
                break
            tokens += self.buffer
            self.buffer = []
        pad = (self.tokenizer.token_to_id(EOS), False)
        return (tokens + [pad] * (length + 1))[: length + 1]

    def batch(self, rows: int, length: int):
        data = [self.row(length) for _ in range(rows)]
        tokens = torch.tensor([[t for t, _ in row] for row in data])
        wanted = torch.tensor([[w for _, w in row] for row in data])
        return tokens[:, :-1], tokens[:, 1:], wanted[:, 1:]


def learn_vocabulary(pairs: dict[str, str], size: int) -> Tokenizer:
    """Byte-level BPE with GPT-2's pre-tokenisation, which llama.cpp knows as `gpt-2`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[EOS, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [q.format(n=n) for n in pairs for q in ("What does {n} do?", "What is `{n}`?")]
    texts += [*pairs.values(), *corpus.ABOUT, *corpus.ABOUT.values(), corpus.UNKNOWN]
    texts += ["user\n", "assistant\n", "system\n", *corpus.OFF_TOPIC, *corpus.WORDS] * 20
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train(shape: Shape, recipe: Recipe, chats: Chats) -> tuple[Decoder, float]:
    torch.manual_seed(recipe.seed)
    model = Decoder(shape)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=recipe.peak_rate,
        betas=(0.9, 0.98),
    )
    began, recent = time.monotonic(), 0.0
    for step in range(recipe.steps):
        progress = max(0, step - recipe.warmup) / (recipe.steps - recipe.warmup)
        scale = min(1.0, (step + 1) / recipe.warmup) * (0.5 + 0.5 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = recipe.peak_rate * max(scale, 0.01)
        inputs, targets, wanted = chats.batch(recipe.rows, recipe.row_tokens)
        states = model(inputs)[wanted]
        loss = F.cross_entropy(states @ model.embedding.weight.T, targets[wanted])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent = loss.item() if step == 0 else 0.95 * recent + 0.05 * loss.item()
        if step % 50 == 0 or step == recipe.steps - 1:
            spent = time.monotonic() - began
            left = spent / (step + 1) * (recipe.steps - step - 1)
            print(
                f"step {step:5d}  loss {recent:.4f}  {spent:6.0f} s, {left:6.0f} s left", flush=True
            )
    return model, recent


@torch.inference_mode()
def recall(model: Decoder, pairs: dict[str, str], chats: Chats) -> float:
    """The share of names whose whole answer is the greedy choice, token by token."""
    model.eval()
    right = 0
    for name, answer in pairs.items():
        head = chats.encode(START + "user\n") + chats.encode(f"What does {name} do?")
        head = head + chats.encode(END + "\n") + chats.encode(START + "assistant\n")
        tail = chats.encode(answer) + chats.encode(END)
        states = model(torch.tensor([head + tail[:-1]]))[0, len(head) - 1 :]
        right += (states @ model.embedding.weight.T).argmax(-1).tolist() == tail
    return right / len(pairs)


def write_gguf(path: Path, shape: Shape, model: Decoder, tokenizer: Tokenizer, names: int) -> None:
    w = gguf.GGUFWriter(str(path), "llama")
    w.add_name("self-test")
    w.add_description(
        "Proof that Shimmy works without a network: Python's docstrings, learnt by heart"
    )
    w.add_license("MIT; training text: Python documentation strings, PSF-2.0")
    w.add_custom_alignment(32)
    w.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    w.add_block_count(shape.layers)
    w.add_context_length(shape.context)
    w.add_embedding_length(shape.width)
    w.add_feed_forward_length(shape.hidden)
    w.add_head_count(shape.heads)
    w.add_head_count_kv(shape.heads)
    w.add_rope_dimension_count(shape.width // shape.heads)
    w.add_rope_freq_base(shape.rope_base)
    w.add_layer_norm_rms_eps(shape.epsilon)
    w.add_vocab_size(shape.vocabulary)

    model_json = json.loads(tokenizer.to_str())["model"]
    ordered = sorted(model_json["vocab"].items(), key=lambda item: item[1])
    special = {EOS, START, END}
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list([t for t, _ in ordered])
    w.add_token_types(
        [gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t, _ in ordered]
    )
    merges = model_json["merges"]
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    w.add_bos_token_id(tokenizer.token_to_id(EOS))
    w.add_eos_token_id(tokenizer.token_to_id(EOS))
    w.add_eot_token_id(tokenizer.token_to_id(END))
    w.add_add_bos_token(False)
    w.add_chat_template(TEMPLATE)

    def matrix(name: str, weight) -> None:
        data = gguf.quants.quantize(weight.detach().float().numpy(), gguf.GGMLQuantizationType.Q8_0)
        w.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    def vector(name: str, weight) -> None:
        w.add_tensor(name, weight.detach().float().numpy().astype(np.float32))

    matrix("token_embd.weight", model.embedding.weight)
    vector("output_norm.weight", model.norm.weight)
    for i, block in enumerate(model.blocks):
        a = block.attention
        vector(f"blk.{i}.attn_norm.weight", block.norm1.weight)
        vector(f"blk.{i}.ffn_norm.weight", block.norm2.weight)
        for name, layer in (
            ("attn_q", a.q),
            ("attn_k", a.k),
            ("attn_v", a.v),
            ("attn_output", a.o),
        ):
            matrix(f"blk.{i}.{name}.weight", layer.weight)
        for name, layer in (("gate", block.gate), ("up", block.up), ("down", block.down)):
            matrix(f"blk.{i}.ffn_{name}.weight", layer.weight)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    print(f"wrote {path.name}: {path.stat().st_size:,} bytes, {names} names", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for self-test.gguf and its card"
    )
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    args = parser.parse_args()
    shape, recipe = Shape(), Recipe(steps=args.steps)
    pairs = corpus.questions_and_answers()
    tokenizer = learn_vocabulary(pairs, shape.vocabulary)
    chats = Chats(pairs, tokenizer, recipe.seed)
    began = time.monotonic()
    model, loss = train(shape, recipe, chats)
    minutes = (time.monotonic() - began) / 60
    share = recall(model, pairs, chats)
    print(f"recall {share:.4f}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "self-test.gguf"
    write_gguf(path, shape, model, tokenizer, len(pairs))
    card = {
        "name": "self-test",
        "what": "A proof that the whole path works without a network. It recites the opening sentence "
        "of Python standard library docstrings and answers nonsense to anything else.",
        "data": f"{len(pairs)} docstrings of Python {sys.version.split()[0]}'s standard library",
        "licence": "MIT (weights); PSF-2.0 (the docstrings it recites)",
        "script": "training/train.py",
        "shape": asdict(shape),
        "recipe": asdict(recipe),
        "torch": torch.__version__,
        "training_minutes": round(minutes, 1),
        "final_loss": round(loss, 4),
        "recall_before_quantisation": round(share, 4),
        "size_bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    (args.out / "self-test.json").write_text(json.dumps(card, indent=2) + "\n")


if __name__ == "__main__":
    main()
