"""The table of rotary positions, made before a standby knows its rank: it is the same for every rank.

vLLM's `get_rope` keeps what it made for the process, and layers that ask for the same table get it. For a long context that is most of
what building a small model takes.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype

logger = logging.getLogger(__name__)


def prepare(vllm_config: Any) -> None:
    """Have vLLM make the tables that most models ask for. A model that asks for others makes them when it is built, as before.

    On the host only, as a standby touches no device, and in this one thread: OpenMP's inherit the processors of the rank
    later on. Raises nothing.
    """
    if not current_platform.is_cpu():
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = vllm_config.model_config
        with set_current_vllm_config(vllm_config), set_default_torch_dtype(model.dtype):
            for parameters in _parameters(model.hf_text_config):
                get_rope(
                    model.get_head_size(),
                    max_position=model.hf_text_config.max_position_embeddings,
                    rope_parameters=parameters,
                )
    except Exception as error:  # models without rotary positions, and with some of their own
        logger.debug("no rotary positions were made ahead: %r", error)
    finally:
        torch.set_num_threads(threads)


def _parameters(config: Any) -> list[dict[str, Any]]:
    """One set, or one for each type of layer."""
    found = config.rope_parameters
    return list(found.values()) if all(isinstance(one, dict) for one in found.values()) else [found]
