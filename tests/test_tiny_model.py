"""The shipped model is a Llama of the promised shape, small, and readable under greedy decoding."""

from __future__ import annotations

import json
import re
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

MODELS = Path(__file__).resolve().parent.parent / "src" / "ghostserve" / "models"
TINY = MODELS / "tiny-llama"
PROMPTS: list[dict[str, str]] = json.loads((MODELS / "prompts.json").read_text(encoding="utf-8"))
GREEDY_TOKENS = 256
DISTINCT_4GRAM_RATIO_MIN = 0.5
SAFETENSORS_BYTES_MAX = 10_000_000
WORD = re.compile(r"[A-Za-z]{3,}")


def distinct_ngram_ratio(tokens: list[int], n: int = 4) -> float:
    """Different n-grams over all n-grams, in (0, 1]: 1 when none repeats, near 0 for a short loop."""
    ngrams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    if not ngrams:
        raise ValueError(f"{len(tokens)} tokens have no {n}-gram")
    return len(set(ngrams)) / len(ngrams)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def log() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((TINY / "training_log.json").read_text(encoding="utf-8"))
    return loaded


_answers: dict[tuple[int, ...], list[int]] = {}


def greedy(model: LlamaForCausalLM, prompt_ids: list[int], tokens: int) -> list[int]:
    """Up to ``tokens`` greedy tokens after the prompt, fewer if the model says the stop token."""
    known = _answers.get(tuple(prompt_ids), [])
    if len(known) >= tokens:
        return known[:tokens]
    ids = torch.tensor([prompt_ids])
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            use_cache=True,
        )
    generated: list[int] = output[0, len(prompt_ids) :].tolist()
    _answers[tuple(prompt_ids)] = generated
    return generated


@pytest.mark.parametrize(
    "degenerate", [[7] * 256, [1, 2, 3] * 85, list(range(40)) * 6, [*range(100), *[5, 6] * 78]]
)
def test_ratio_finds_a_loop(degenerate: list[int]) -> None:
    assert distinct_ngram_ratio(degenerate) < DISTINCT_4GRAM_RATIO_MIN


def test_ratio_of_distinct_tokens_is_one() -> None:
    assert distinct_ngram_ratio(list(range(256))) == 1.0


def test_ratio_of_too_few_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="no 4-gram"):
        distinct_ngram_ratio([1, 2, 3])


def test_prompts_are_named_and_enough() -> None:
    assert len(PROMPTS) >= 4
    assert len({prompt["name"] for prompt in PROMPTS}) == len(PROMPTS)
    assert all(set(prompt) == {"name", "prompt"} for prompt in PROMPTS)


@pytest.mark.long
@pytest.mark.parametrize("prompt", PROMPTS, ids=[prompt["name"] for prompt in PROMPTS])
def test_greedy_text_does_not_repeat(model: LlamaForCausalLM, tokenizer: Any, prompt: dict[str, str]) -> None:
    tokens = greedy(model, tokenizer(prompt["prompt"]).input_ids, GREEDY_TOKENS)
    assert len(tokens) == GREEDY_TOKENS, "the model stopped early"
    ratio = distinct_ngram_ratio(tokens)
    assert ratio >= DISTINCT_4GRAM_RATIO_MIN, tokenizer.decode(tokens)


@pytest.mark.long
def test_greedy_text_is_made_of_words(model: LlamaForCausalLM, tokenizer: Any, log: dict[str, Any]) -> None:
    """Readable, as far as a test can say: nine of ten words are words of the corpus."""
    root = Path(sysconfig.get_paths()["stdlib"])
    corpus = "".join((root / name).read_text(encoding="utf-8") for name in log["corpus"]["trained_on"])
    known = set(WORD.findall(corpus))
    words = [
        word
        for prompt in PROMPTS
        for word in WORD.findall(tokenizer.decode(greedy(model, tokenizer(prompt["prompt"]).input_ids, 96)))
    ]
    assert len(words) > 20 * len(PROMPTS)
    assert sum(word in known for word in words) >= 0.9 * len(words)


def test_architecture(model: LlamaForCausalLM) -> None:
    config = model.config
    assert config.architectures == ["LlamaForCausalLM"]
    assert (config.num_hidden_layers, config.hidden_size) == (4, 256)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 4, 64)
    assert config.max_position_embeddings == 32768
    assert config.rope_parameters["rope_type"] == "default"
    assert config.intermediate_size % 4 == 0
    assert config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_are_small_and_finite(model: LlamaForCausalLM) -> None:
    assert (TINY / "model.safetensors").stat().st_size <= SAFETENSORS_BYTES_MAX
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_tokenizer_is_byte_level_and_fits_the_model(model: LlamaForCausalLM, tokenizer: Any) -> None:
    assert len(tokenizer) == model.config.vocab_size
    assert 1000 <= len(tokenizer) <= 2048
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
    for text in ("import os\nfor name in", "    def f():\n\t'naïve — 名前 🙂'\r\n", "\x00\x7f"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_chat_template(model: LlamaForCausalLM, tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What does random.choice do?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|system|>\nYou are a helpful assistant.<|endoftext|>\n"
        "<|user|>\nWhat does random.choice do?<|endoftext|>\n"
        "<|assistant|>\n"
    )
    ids = tokenizer(text).input_ids
    assert {1, 2, 3, tokenizer.eos_token_id} <= set(ids), "the markers are single tokens"
    answer = greedy(model, ids, GREEDY_TOKENS)
    assert answer[-1] == tokenizer.eos_token_id, "a chat answer ends by itself"
    assert tokenizer.decode(answer, skip_special_tokens=True).strip()


def test_training_log_is_complete(log: dict[str, Any], model: LlamaForCausalLM) -> None:
    assert log["corpus"]["licence"] == "PSF-2.0"
    assert not set(log["corpus"]["trained_on"]) & set(log["corpus"]["held_out"])
    assert len(log["corpus"]["sha256"]) == 64
    assert log["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert log["loss_curve"][0]["loss"] > log["final_loss"]
    assert log["held_out_loss_as_stored"] > log["final_loss"], "it memorises, and the log says so"
    assert set(log["versions"]) == {"python", "torch", "transformers", "tokenizers"}


def test_model_card_quotes_the_log(log: dict[str, Any]) -> None:
    card = (TINY / "README.md").read_text(encoding="utf-8")
    assert f"{log['held_out_loss_as_stored']:.2f} nats" in card
    assert f"{log['final_loss']:.2f} nats" in card
    assert log["corpus"]["sha256"] in card
    assert "Python Software Foundation" in card
