"""Train the tiny Llama that ships with ghostserve, from nothing, on one CPU core.

What it is: a real ``LlamaForCausalLM`` (4 layers, hidden 256, 4 heads) that has read a fixed list of
modules of the Python standard library, source and doc strings, some twenty-five times.  It is meant to have
partly memorised them: a demo needs text that a person can read and that does not loop under greedy
decoding, and a model of this size that has *not* memorised its corpus loops.  ``HELD_OUT`` modules are
seen neither by the tokenizer nor by the model; their loss is measured along the way and written down.

What it does not know: ghostserve.  It needs ``torch``, ``transformers``, ``tokenizers`` and
``safetensors`` only, and reads the corpus from the interpreter that runs it, so another Python
version gives another corpus; the training log carries the version and the SHA-256.

How it trains, and why so:

* Every fourth step reads 1 window of 2048 tokens, the others 4 windows of 512: attention learns
  distances up to 2048 for little time.  Positions past 2048 (the configuration allows 32768) are untrained.
* Half of the windows begin at the start of an unindented line, as a prompt does, the rest anywhere.
* One token of eight is packed chat: "What does random.choice do?" and the doc string as the answer.
* Matrices learn with Muon (momentum made orthogonal by Newton-Schulz), the rest with AdamW.
* Nothing penalises repetition, in training or decoding.

The model directory is written to a temporary one and moved into place file by file::

    nice -n 19 python scripts/train_tiny_model.py --steps 1100 --out src/ghostserve/models/tiny-llama
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import os
import platform
import random
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

TRAINED_ON = (
    "asyncio/locks.py", "asyncio/protocols.py", "asyncio/queues.py", "asyncio/runners.py",
    "asyncio/transports.py", "cmd.py", "contextlib.py", "copy.py", "glob.py", "heapq.py",
    "json/__init__.py", "json/decoder.py", "json/encoder.py", "os.py", "queue.py", "random.py",
    "shelve.py", "tempfile.py",
)  # fmt: skip
"""Modules rich in doc strings, none with a copyright line of its own beside the PSF's."""

HELD_OUT = ("asyncio/timeouts.py", "fnmatch.py", "graphlib.py", "linecache.py", "sched.py")

END = "<|endoftext|>"
SPECIAL_TOKENS = (END, "<|system|>", "<|user|>", "<|assistant|>")
"""``END`` has id 0; it closes a module and a chat turn, and is the only stop token."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|endoftext|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"
)
SYSTEM_PROMPT = "You are a helpful assistant."
QUESTIONS = ("What does {name} do?", "Explain {name}.", "What is {name}?", "How do I use {name}?")
ANSWER_CHARS_MAX = 900

VOCABULARY_TOKENS = 2048
WINDOW_TOKENS, WINDOWS = 512, 4
LONG_WINDOW_TOKENS, LONG_WINDOWS, LONG_EVERY_STEPS = 2048, 1, 4
WARMUP_STEPS = 20
CONSTANT_FRACTION = 0.3
MUON_RATE, ADAM_RATE = 0.05, 0.006
EVALUATE_EVERY_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The text that one run reads: whole modules, and chats made of the trained modules' doc strings."""

    modules: tuple[str, ...]
    held_out: tuple[str, ...]
    chats: tuple[tuple[str, str], ...]

    @property
    def sha256(self) -> str:
        return hashlib.sha256("\0".join((*self.modules, *self.held_out)).encode()).hexdigest()


def read_corpus() -> Corpus:
    """Read the listed modules of the running interpreter's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    trained = {name: (root / name).read_text(encoding="utf-8") for name in TRAINED_ON}
    return Corpus(
        modules=tuple(trained.values()),
        held_out=tuple((root / name).read_text(encoding="utf-8") for name in HELD_OUT),
        chats=tuple(chat for name, text in trained.items() for chat in chats_of(name, text)),
    )


def chats_of(path: str, source: str) -> list[tuple[str, str]]:
    """``(qualified name, doc string)`` of a module and of its public functions, classes and methods."""
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    chats: list[tuple[str, str]] = []

    def visit(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> None:
        doc = ast.get_docstring(node)
        if doc and len(doc) > 20:
            whole_paragraphs = f"{doc}\n\n"[:ANSWER_CHARS_MAX].rpartition("\n\n")[0]
            chats.append((name, whole_paragraphs or doc[:ANSWER_CHARS_MAX]))
        if isinstance(node, ast.Module | ast.ClassDef):
            for child in node.body:
                if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    continue
                if not child.name.startswith("_"):
                    visit(child, f"{name}.{child.name}")

    visit(ast.parse(source), module)
    return chats


def train_tokenizer(texts: tuple[str, ...]) -> tokenizers.Tokenizer:
    """A byte-level BPE: every text has an encoding, and decoding gives it back byte for byte."""
    tokenizer = tokenizers.Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY_TOKENS,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Windows:
    """Draws training windows; ``rng`` alone decides which."""

    def __init__(self, corpus: Corpus, tokenizer: tokenizers.Tokenizer, rng: random.Random) -> None:
        self._corpus, self._tokenizer, self._rng = corpus, tokenizer, rng
        ids: list[int] = []
        self._line_starts: list[int] = []
        for text in corpus.modules:
            encoding = tokenizer.encode(text + END)
            for index, (start, _) in enumerate(encoding.offsets):
                if (start == 0 or text[start - 1] == "\n") and not text[start : start + 1].isspace():
                    self._line_starts.append(len(ids) + index)
            ids += encoding.ids
        self.tokens = len(ids)
        self._ids = ids + ids[:LONG_WINDOW_TOKENS]  # a window past the end goes on at the beginning

    def batch(self, step: int) -> Tensor:
        """Token ids, shape [windows, window_tokens], of this step."""
        if step % LONG_EVERY_STEPS == LONG_EVERY_STEPS - 1:
            return torch.tensor([self._module_window(LONG_WINDOW_TOKENS) for _ in range(LONG_WINDOWS)])
        rows = [self._module_window(WINDOW_TOKENS) for _ in range(WINDOWS - 1)]
        chats = step % 2 == 0
        return torch.tensor([*rows, (self._chat_window if chats else self._module_window)(WINDOW_TOKENS)])

    def _module_window(self, length: int) -> list[int]:
        anywhere = self._rng.random() < 0.5
        start = self._rng.randrange(self.tokens) if anywhere else self._rng.choice(self._line_starts)
        return self._ids[start : start + length]

    def _chat_window(self, length: int) -> list[int]:
        ids: list[int] = []
        while len(ids) < length:
            name, answer = self._rng.choice(self._corpus.chats)
            question = self._rng.choice(QUESTIONS).format(name=name)
            text = f"<|user|>\n{question}{END}\n<|assistant|>\n{answer}{END}\n"
            if self._rng.random() < 0.25:
                text = f"<|system|>\n{SYSTEM_PROMPT}{END}\n{text}"
            ids += self._tokenizer.encode(text).ids
        return ids[:length]


class Muon:
    """Momentum whose update is made nearly orthogonal: one step per matrix, in float32.

    (``torch.optim.Muon`` does the same in bfloat16, twenty times slower on a CPU without bfloat16 units.)
    Source: https://kellerjordan.github.io/posts/muon/
    """

    def __init__(self, matrices: list[torch.nn.Parameter]) -> None:
        self._matrices = matrices
        self._momenta = [torch.zeros_like(matrix) for matrix in matrices]

    @torch.no_grad()
    def step(self, rate: float, momentum: float = 0.95) -> None:
        for matrix, average in zip(self._matrices, self._momenta, strict=True):
            assert matrix.grad is not None
            average.lerp_(matrix.grad, 1 - momentum)
            update = orthogonalised(matrix.grad.lerp(average, momentum))
            matrix.add_(update, alpha=-rate * math.sqrt(max(1.0, matrix.shape[0] / matrix.shape[1])))


def orthogonalised(update: Tensor, iterations: int = 5) -> Tensor:
    """``update`` [rows, columns] with all singular values pushed to about 1 (Newton-Schulz, quintic)."""
    tall = update.shape[0] > update.shape[1]
    x: Tensor = update.T if tall else update
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def new_model() -> LlamaForCausalLM:
    """A Llama with random weights in float32; every size divides by 4 shards."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY_TOKENS,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=64,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def rate_factor(step: int, steps: int) -> float:
    """1 after a short warm-up, then down to 0 in a straight line."""
    constant_until = steps * CONSTANT_FRACTION
    decay = (steps - step) / (steps - constant_until)
    return min(1.0, (step + 1) / WARMUP_STEPS, decay)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, ids: Tensor) -> float:
    """Mean cross entropy, nats per token, over windows of 512 tokens that do not overlap."""
    windows = ids[: len(ids) // WINDOW_TOKENS * WINDOW_TOKENS].view(-1, WINDOW_TOKENS)
    losses: list[float] = [
        model(input_ids=row, labels=row, use_cache=False).loss.item() for row in windows.split(4)
    ]
    weights = [len(row) for row in windows.split(4)]
    return sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)


def train(model: LlamaForCausalLM, windows: Windows, held_out_ids: Tensor, steps: int) -> dict[str, Any]:
    """Train in place; returns the part of the log that the training itself measured."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    curve: list[dict[str, float]] = []
    held_out: list[dict[str, float]] = []
    started = printed = time.monotonic()
    tokens = 0
    for step in range(steps):
        ids = windows.batch(step)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        factor = rate_factor(step, steps)
        muon.step(MUON_RATE * factor)
        adam.param_groups[0]["lr"] = ADAM_RATE * factor
        adam.step()
        model.zero_grad()
        tokens += ids.numel()
        now = time.monotonic()
        last = step == steps - 1
        if step % 10 == 0 or last:
            curve.append({"step": step, "tokens": tokens, "loss": round(loss.item(), 4)})
        if step % EVALUATE_EVERY_STEPS == EVALUATE_EVERY_STEPS - 1 or last:
            held_out.append({"step": step, "loss": round(held_out_loss(model, held_out_ids), 4)})
            print(f"step {step} held-out loss {held_out[-1]['loss']}", flush=True)
        if now - printed > 5 or last:
            printed = now
            speed = tokens / (now - started)
            print(f"step {step}/{steps} loss {loss.item():.3f} {speed:.0f} tokens/s {now - started:.0f} s",
                  flush=True)  # fmt: skip
    return {
        "seconds": round(time.monotonic() - started, 1),
        "tokens_read": tokens,
        "final_loss": round(sum(point["loss"] for point in curve[-5:]) / len(curve[-5:]), 4),
        "final_held_out_loss": held_out[-1]["loss"],
        "best_held_out_loss": min(point["loss"] for point in held_out),
        "loss_curve": curve,
        "held_out_curve": held_out,
    }


def write_model(
    out: Path, model: LlamaForCausalLM, tokenizer: tokenizers.Tokenizer, log: dict[str, Any]
) -> None:
    """Write everything beside ``out``, then move it file by file: a reader never sees half a file."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.max_position_embeddings,
    }
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch)
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        (folder / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")
        for path in folder.iterdir():
            path.chmod(0o644)
            os.replace(path, out / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny Llama that ships with ghostserve.")
    parser.add_argument("--out", type=Path, required=True, help="model directory to write")
    parser.add_argument("--steps", type=int, default=1100, help="optimiser steps of 2048 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    corpus = read_corpus()
    tokenizer = train_tokenizer(corpus.modules)
    windows = Windows(corpus, tokenizer, random.Random(args.seed))
    held_out_ids = torch.tensor(tokenizer.encode(END.join(corpus.held_out)).ids)
    held_out_bytes = sum(len(text.encode()) for text in corpus.held_out)
    print(f"{windows.tokens} tokens, {len(corpus.chats)} chats, {len(held_out_ids)} held-out tokens")

    model = new_model()
    measured = train(model, windows, held_out_ids, args.steps)
    model.to(torch.bfloat16).to(torch.float32)
    as_stored = held_out_loss(model, held_out_ids)
    log = {
        "corpus": {
            "licence": "PSF-2.0",
            "trained_on": TRAINED_ON,
            "trained_on_bytes": sum(len(text.encode()) for text in corpus.modules),
            "trained_on_tokens": windows.tokens,
            "chats": len(corpus.chats),
            "held_out": HELD_OUT,
            "held_out_bytes": held_out_bytes,
            "held_out_tokens": len(held_out_ids),
            "sha256": corpus.sha256,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seed": args.seed,
        "steps": args.steps,
        "threads": args.threads,
        "held_out_loss_as_stored": round(as_stored, 4),
        "held_out_bits_per_byte_as_stored": round(
            as_stored / math.log(2) * len(held_out_ids) / held_out_bytes, 4
        ),
        **measured,
    }
    write_model(args.out, model, tokenizer, log)


if __name__ == "__main__":
    main()
