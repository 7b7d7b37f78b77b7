"""Imported once by the fork server, so that a replacement starts with its imports done.

Must start no thread and touch no device: what is imported here is inherited by every worker.
"""

import vllm.model_executor.layers.quantization.online.base  # by every loader, as it runs
import vllm.v1.worker.cpu_model_runner
import vllm.v1.worker.gpu_worker
from vllm.platforms import current_platform

import ghostserve.engine.rendezvous  # tells torch how ranks meet
import ghostserve.engine.spawn
import ghostserve.engine.worker  # noqa: F401

current_platform.import_kernels()
if current_platform.is_cpu():
    import vllm.v1.attention.backends.cpu_attn  # noqa: F401  # chosen, and imported, as the first layer is built

    current_platform.register_triton_kernel_overrides()
