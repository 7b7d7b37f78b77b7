"""vLLM's load format `ghostserve`: plain safetensors at disk speed, once per machine, and out of the pool where it is there.

Which files, which of their tensors, and what becomes of them is vLLM's own business (`DefaultModelLoader`); ours is how
their bytes get here, and that a rank's parameters are kept for who comes next (`rank_image.py`).
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import torch
from torch import nn
from vllm.config import LoadConfig, ModelConfig, VllmConfig, replace
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.model_loader import register_model_loader, weight_utils
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight

from ghostserve.clock import monotonic_s
from ghostserve.config import GhostConfig
from ghostserve.engine import rank_image, weights_identity
from ghostserve.engine.load_format import LOAD_FORMAT, NEWCOMER_KEY
from ghostserve.engine.loader_files import FileBytes, tensors
from ghostserve.engine.rank_made_of import made_of
from ghostserve.errors import UnsafeWeightsError
from ghostserve.weights.checksum_file import ChecksumFile
from ghostserve.weights.checksums import Checksums
from ghostserve.weights.model_files import CONVERT, ModelFiles, WeightsFile, demand_complete, open_files
from ghostserve.weights.own_file import OwnFile
from ghostserve.weights.pool import TIMEOUT_S, Pool
from ghostserve.weights.pool_messages import NAME_CHARACTERS_MAX
from ghostserve.weights.pooled_file import PooledFile
from ghostserve.weights.rank_image import image_key
from ghostserve.weights.recycled import Recycler

RECOVERY_TIMEOUT_S = 0.5  # clients wait for the answer meanwhile


class GhostModelLoader(DefaultModelLoader):
    """For one load of one rank."""

    def __init__(self, load_config: LoadConfig) -> None:
        extra = dict(load_config.model_loader_extra_config)
        self._in_recovery = NEWCOMER_KEY in extra
        self._server_source: str | None = extra.pop(NEWCOMER_KEY, None) or None
        # The files that vLLM takes by default, found as it does.
        super().__init__(replace(load_config, load_format="auto", model_loader_extra_config=extra))
        self._fresh: VllmConfig | None = None  # set while a model is built and not loaded
        self._pool: Pool | None = None
        self._label = ""
        self._readers = 1

    counter_before_loading_weights: float

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        self._fresh, self._label = vllm_config, str(model_config.model)[-NAME_CHARACTERS_MAX:]
        return super().load_model(vllm_config, model_config, prefix)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Into a model that was just built: by way of the pool. Into one in use: as vLLM does."""
        vllm_config, self._fresh = self._fresh, None

        def fill() -> None:
            super(GhostModelLoader, self).load_weights(model, model_config)

        if vllm_config is None:
            fill()
            return
        self._pool = self._connect()
        self._readers = vllm_config.parallel_config.local_world_size
        try:
            rank_image.load(model, self._pool, self._wanted(model, vllm_config, model_config), fill)
        finally:
            self._pool = None

    def _connect(self) -> Pool | None:
        """None: the pool is off, or nobody holds one. A replacement does not wait until somebody does."""
        return Pool.connect(
            start=not self._in_recovery,
            budget_bytes=GhostConfig.from_environment().weights_memory,
            timeout_s=RECOVERY_TIMEOUT_S if self._in_recovery else TIMEOUT_S,
        )

    def _wanted(
        self, model: nn.Module, vllm_config: VllmConfig, model_config: ModelConfig
    ) -> rank_image.Wanted | None:
        """None where it is not known what the parameters come from."""
        if self._pool is None or getattr(model, "secondary_weights", None):
            return None
        if self._server_source is None and weights_identity.is_downloaded(model_config.model):
            self.download_model(model_config)  # only now is it known what a branch names

        def source() -> str | None:
            return weights_identity.source_of(
                model_config.model, revision=model_config.revision, cache=self.load_config.download_dir
            )

        loaded = self._server_source or source()
        if loaded is None:
            return None
        return rank_image.Wanted(
            key=image_key(source=loaded, made_of=made_of(model, vllm_config, model_config)),
            label=self._label,
            in_recovery=self._in_recovery,
            unchanged=lambda: source() == loaded,
        )

    # -- the files, as vLLM names them -------------------------------------------------------------------------------

    def _get_weights_iterator(
        self, source: DefaultModelLoader.Source
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """As vLLM's; only the bytes come another way."""
        if self.load_config.safetensors_load_strategy == "torchao":  # made into tensors of other classes
            return super()._get_weights_iterator(source)
        folder, paths, safetensors, index = self._prepare_weights(
            source.model_or_path,
            source.subfolder,
            source.revision,
            source.fall_back_to_pt,
            source.allow_patterns_overrides,
        )
        if not safetensors:
            raise UnsafeWeightsError(
                f"{source.model_or_path}: has only pickled weights, which could run code: {CONVERT}"
            )
        if not Path(folder, index).is_file():
            demand_complete([Path(path) for path in paths])
        paths = self._needed(source, folder, paths, index)
        named = [Path(path) for path in sorted(paths, key=weight_utils._natural_sort_key)]
        files = open_files(named, folder=Path(folder))
        if self.counter_before_loading_weights == 0.0:
            self.counter_before_loading_weights = monotonic_s()
        return self._tensors(source.prefix, files)

    def _needed(
        self, source: DefaultModelLoader.Source, folder: str, paths: list[str], index: str
    ) -> list[str]:
        """Without files that vLLM knows it would not use."""
        if self._encoder_only_lm_prefixes is not None:
            paths = weight_utils.filter_mm_encoder_only_safetensors_files(
                paths,
                folder,
                index,
                self._encoder_only_lm_prefixes,
                weights_mapper=self._encoder_only_weights_mapper,
            )
        if source.is_unused_weight is not None:
            paths = weight_utils.filter_safetensors_files_by_weight_name(paths, source.is_unused_weight)
        return paths

    def _tensors(self, prefix: str, model: ModelFiles) -> Generator[tuple[str, torch.Tensor], None, None]:
        shown = weight_utils.tqdm(
            model.files,
            desc="Loading safetensors checkpoint shards",
            disable=not weight_utils.enable_tqdm(self.load_config.use_tqdm_on_load),
            bar_format=weight_utils._BAR_FORMAT,
        )
        local_experts = self.local_expert_ids
        checksums, recycler = ChecksumFile(model), Recycler()

        def open_bytes(file: WeightsFile, spans: list[tuple[int, int]]) -> FileBytes:
            return self._open(file, spans, checksums.of(file), recycler)

        for name, tensor in tensors(
            shown, open_bytes, lambda name: not should_skip_weight(name, local_experts)
        ):
            yield prefix + name, tensor
        if checksums.learned and not self._in_recovery:
            checksums.save()

    def _open(
        self, file: WeightsFile, spans: list[tuple[int, int]], verify: Checksums, recycler: Recycler
    ) -> FileBytes:
        """Several ranks share what one of them reads; one alone reads only what it wants, past the page cache."""
        several = get_tensor_model_parallel_world_size() > 1 and not self._in_recovery
        if several and self._pool is not None:
            return PooledFile(
                self._pool,
                file,
                spans,
                label=self._label,
                verify=verify,
                readers=self._readers,
                recycler=recycler,
            )
        return OwnFile(file, spans, recycler, direct=False if several else None, verify=verify)


register_model_loader(LOAD_FORMAT)(GhostModelLoader)
