"""An adapter on a model that the load format `ghostserve` has loaded says what it says on one that vLLM has loaded. Without protection, which refuses LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file
from servers import mapped_segments

from ghostserve.testing.server import ServerProcess, ghostserve_command
from ghostserve.weights import pool_start, runtime_dir
from real import kit

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(300)]

RANK = 8
PROMPTS = ("Once upon a time", "The river", "1 2 3")


def make_adapter(folder: Path) -> Path:
    """Random, and strong enough to be noticed."""
    config = json.loads((kit.TINY / "config.json").read_text())
    hidden, generator = config["hidden_size"], torch.Generator().manual_seed(1)
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    width = {"q_proj": config["num_attention_heads"] * head, "v_proj": config["num_key_value_heads"] * head}
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, out in width.items():
            where = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{where}.lora_A.weight"] = torch.randn(RANK, hidden, generator=generator) * 0.3
            tensors[f"{where}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 0.3
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": [*width], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


def answers(directory: Path, load_format: str, adapter: Path) -> dict[str, list[Any]]:
    """Tokens and their logprobs, of the model and of the adapter on it."""
    directory.mkdir()
    command = ghostserve_command(
        kit.TINY,
        "--tensor-parallel-size", "2",
        "--max-model-len", "1024",
        "--kv-cache-memory-bytes", str(48 << 20),
        "--protection", "none",
        "--load-format", load_format,
        "--enable-lora",
        "--gpu-memory-utilization", "0.5",
        "--lora-modules", f"adapter={adapter}",
        "--served-model-name", "tiny",
    )  # fmt: skip
    pool = directory / "pool"
    pool.mkdir(mode=0o700)
    environment = {
        **kit.SERVER_ENV,
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",  # vLLM's own workers want a NUMA node each
        runtime_dir.RUNTIME_DIR_ENV: str(pool),
    }
    segments: set[Path] = set()
    try:
        with ServerProcess(command, log_dir=directory, env=environment) as server:
            server.start()
            server.wait_ready(timeout_s=240)
            server.record_processes()
            segments = mapped_segments(server)
            return {
                model: [ask(server, model, prompt) for prompt in PROMPTS] for model in ("tiny", "adapter")
            }
    finally:
        pool_start.stop_holder(pool)
        for segment in segments:  # vLLM's own workers leave what they have in /dev/shm
            segment.unlink(missing_ok=True)


def ask(server: ServerProcess, model: str, prompt: str) -> Any:
    body = {"model": model, "prompt": prompt, "max_tokens": 24, "temperature": 0, "logprobs": 3}
    answer = httpx.post(f"{server.base_url}/v1/completions", json=body, timeout=60)
    answer.raise_for_status()
    return answer.json()["choices"][0]["logprobs"]


def test_an_adapter_on_either_loader_s_model(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    ours = answers(tmp_path / "ours", "ghostserve", adapter)
    stock = answers(tmp_path / "stock", "auto", adapter)
    assert ours == stock
    assert ours["adapter"] != ours["tiny"]  # or it would prove nothing
