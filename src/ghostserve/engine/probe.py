"""Finds the slot maps by writing a scratch block through each layer's own KV write.

Runs once, before the first request and in every newcomer before its KV is restored. The scratch block is
vLLM's null block 0, which never holds data; it is left as it was found.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ghostserve.errors import UnsupportedError
from ghostserve.shadow.layout import probe_bits, probe_values, slot_words
from ghostserve.shadow.mirror import GroupMap, Mirror

SCRATCH_BLOCK = 0


def kv_storage(runner: Any) -> torch.UntypedStorage:
    """The one allocation behind every layer's KV. Raises UnsupportedError if there are several."""
    storages = {cache.untyped_storage().data_ptr() for cache in runner.kv_caches}
    if len(storages) != 1:
        raise UnsupportedError(
            f"KV cache lives in {len(storages)} allocations, one is expected; run with --protection none"
        )
    storage: torch.UntypedStorage = runner.kv_caches[0].untyped_storage()
    return storage


def probe(
    runner: Any, kv_cache_config: Any, layers: dict[str, Any]
) -> tuple[torch.Tensor, tuple[GroupMap, ...]]:
    """Word view of the KV memory and one slot map per KV group.

    `layers` maps layer names to vLLM's attention layers with their KV bound.
    """
    storage = kv_storage(runner)
    word_bytes = min(cache.element_size() for cache in runner.kv_caches)
    kv = Mirror.words_of(storage, word_bytes, runner.device)
    placement = {name: tensor for tensor in kv_cache_config.kv_cache_tensors for name in tensor.layers}
    groups = []
    for group in kv_cache_config.kv_cache_groups:
        words, strides, names = [], [], []
        for name in group.layer_names:
            if name not in placement:
                continue  # shares another layer's KV: same bytes, already mapped
            tensor = placement[name]
            first = tensor.offset + tensor.layers.index(name) * tensor.layer_stride
            page_bytes = min(tensor.block_stride, tensor.layer_stride)
            page = kv[first // word_bytes : (first + page_bytes) // word_bytes]
            found = _probe_layer(layers[name], page, group.kv_cache_spec.block_size) + first // word_bytes
            words.append(found)
            names.append((name, found.shape[1]))
            strides.append(np.full(found.shape[1], tensor.block_stride // word_bytes, dtype=np.int64))
        groups.append(
            GroupMap(
                words=torch.from_numpy(np.concatenate(words, axis=1)).to(runner.device),
                stride_words=torch.from_numpy(np.concatenate(strides)).to(runner.device),
                layers=tuple(names),
            )
        )
    return kv, tuple(groups)


def _probe_layer(layer: Any, page: torch.Tensor, block_size: int) -> npt.NDArray[np.int64]:
    """Word offsets of every slot within `page`, a layer's bytes of the scratch block. [block_size, words]."""
    cache = layer.kv_cache
    before = page.clone()
    try:
        page.zero_()
        used = _plane(layer, cache, page, probe_values(block_size, None))
        planes = []
        for bit in range(probe_bits(block_size)):
            page.zero_()
            planes.append(_plane(layer, cache, page, probe_values(block_size, bit)))
    finally:
        page.copy_(before)
    return slot_words(used, planes, block_size=block_size)


def _plane(
    layer: Any, cache: torch.Tensor, page: torch.Tensor, values: npt.NDArray[np.float32]
) -> npt.NDArray[np.bool_]:
    """Write `values[slot]` into every K and V element of each slot; which words are not zero then."""
    slots = len(values)
    ones = torch.from_numpy(values).to(device=cache.device, dtype=layer.dtype)
    key = ones.view(slots, 1, 1).expand(slots, layer.num_kv_heads, layer.head_size).contiguous()
    value = ones.view(slots, 1, 1).expand(slots, layer.num_kv_heads, layer.head_size_v).contiguous()
    slot_mapping = torch.arange(slots, dtype=torch.int64, device=cache.device) + SCRATCH_BLOCK * slots
    layer.impl.do_kv_cache_update(layer, key, value, cache, slot_mapping)
    return (page != 0).cpu().numpy()


def element_of(runner: Any, cache_dtype: str) -> str:
    """What the KV consists of, by torch's name; "" if it is of several kinds, or packed in a way of its own.

    `cache_dtype`: vLLM's name for it, which tells what the bytes of an 8-bit cache are.
    """
    dtypes = {cache.dtype for cache in runner.kv_caches}
    if len(dtypes) != 1:
        return ""
    (dtype,) = dtypes
    name = str(dtype).removeprefix("torch.")
    if dtype is torch.uint8:
        return {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}.get(
            cache_dtype, ""
        )
    return name if dtype.is_floating_point else ""
