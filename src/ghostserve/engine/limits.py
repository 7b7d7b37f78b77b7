"""What is refused at start for now, each with a sentence saying why and what to do."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from ghostserve.errors import UnsupportedError
from ghostserve.types import STEPS_IN_FLIGHT_MAX


def refuse_unsupported(vllm_config: Any) -> None:
    """Raise UnsupportedError for a configuration whose recovery would not be exact."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    refusals = {
        "pipeline parallelism (--pipeline-parallel-size > 1)": parallel.pipeline_parallel_size > 1,
        "data parallelism (--data-parallel-size > 1)": parallel.data_parallel_size > 1,
        "several nodes (--nnodes > 1)": parallel.nnodes > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "speculative decoding": vllm_config.speculative_config is not None,
        "LoRA adapters": vllm_config.lora_config is not None,
        "pooling models (--runner pooling)": model.runner_type == "pooling",
        "custom logits processors (--logits-processors)": bool(model.logits_processors),
        "weight transfer (--weight-transfer-config)": vllm_config.weight_transfer_config is not None,
        "encoder-decoder models": bool(model.is_encoder_decoder),
        "multimodal models": bool(model.is_multimodal_model),
        "Mamba and linear-attention layers": bool(model.is_hybrid or model.is_attention_free),
        "a KV connector (--kv-transfer-config)": vllm_config.kv_transfer_config is not None,
        "sleep mode (--enable-sleep-mode)": bool(model.enable_sleep_mode),
        "expert-parallel load balancing (--enable-eplb)": bool(parallel.enable_eplb),
        "dual-batch overlap (--enable-dbo)": bool(parallel.enable_dbo),
        f"more than {STEPS_IN_FLIGHT_MAX} batches in flight": vllm_config.max_concurrent_batches
        > STEPS_IN_FLIGHT_MAX,
    }
    for what, present in refusals.items():
        if present:
            raise UnsupportedError(
                f"{what} cannot be recovered exactly yet; serve without it, or with --protection none"
            )


def refuse_unsupported_kv(kv_cache_config: Any) -> None:
    """Raise UnsupportedError for KV that the shadow does not understand."""
    if kv_cache_config.has_mamba_layers:
        raise UnsupportedError(
            "Mamba state is rewritten by every step and cannot be rebuilt yet; use --protection none"
        )
    for group in kv_cache_config.kv_cache_groups:
        if group.host_resident:
            raise UnsupportedError(
                "KV that already lives in host memory is not protected yet; use --protection none"
            )


def refuse_other_servers(arguments: Namespace) -> None:
    """Raise UnsupportedError for flags that ask vLLM for another kind of front than the one we run."""
    others = {
        "--api-server-count > 1": (arguments.api_server_count or 1) > 1,
        "--headless": bool(arguments.headless),
        "--grpc": bool(arguments.grpc),
    }
    for what, given in others.items():
        if given:
            raise UnsupportedError(f"{what}: ghostserve runs one HTTP server; leave it out")


def refuse_arguments(arguments: Namespace) -> None:
    """Raise UsageError for flags that ask for what we replace or do not do yet."""
    refusals = {
        "--distributed-executor-backend": arguments.distributed_executor_backend not in (None, "mp"),
        "--worker-cls": arguments.worker_cls not in (None, "auto"),
        "--scheduler-cls": arguments.scheduler_cls is not None,
    }
    for flag, given in refusals.items():
        if given:
            raise UnsupportedError(
                f"{flag} {getattr(arguments, flag[2:].replace('-', '_'))}: ghostserve brings its own, which "
                f"recovery needs; leave the flag out, or use --protection none"
            )
    not_yet = {
        "--pipeline-parallel-size > 1": arguments.pipeline_parallel_size > 1,
        "--data-parallel-size > 1": arguments.data_parallel_size > 1,
        "--kv-transfer-config": arguments.kv_transfer_config is not None,
    }
    for what, given in not_yet.items():
        if given:
            raise UnsupportedError(f"{what} cannot be recovered yet; leave it out, or use --protection none")
