"""Samples: from URLs to batches. Knows no model and no process group.

The public names. They are imported on first use: an error class or a URL helper must not cost an import of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.augment import AugmentConfig, parse_aug_cfg
    from data.batch import Batch, Position
    from data.captions import CaptionConfig
    from data.catalog import Catalog, open_catalog, sources_of
    from data.config import LoaderConfig
    from data.cursors import LaneCursor
    from data.device import DeviceTransform
    from data.errors import DataConfigError, DataError, ShardError, StorageError, TarError
    from data.eval_reader import (
        EvalBatch,
        class_folders_of,
        class_names_of,
        read_labelled,
        read_lines,
        read_pairs,
        templates_of,
    )
    from data.files import read_file, write_file
    from data.folder_source import folder_shards
    from data.loader import TrainLoader, build_train_loader, run_preflight
    from data.order import lanes_per_rank
    from data.preflight import check_storage, preflight
    from data.preflight_report import PreflightReport
    from data.rows import CsvConfig
    from data.samples import RawSample, SampleError, SampleId
    from data.shard_index import ShardIndex, build_index, index_url
    from data.sizes import count_samples, shard_name, sizes_url, total_samples
    from data.stats import LoaderStats, source_epochs
    from data.storage import ByteStream, open_stream, probe
    from data.synthetic import synthetic_shards
    from data.table import table_shards
    from data.tar import read_samples
    from data.urls import Source, dataset_type_of, expand_sources, is_local, is_pipe, local_path, mask_url
    from data.where import Filter, Where

_HOMES = {
    "augment": ("AugmentConfig", "parse_aug_cfg"),
    "batch": ("Batch", "Position"),
    "captions": ("CaptionConfig",),
    "catalog": ("Catalog", "open_catalog", "sources_of"),
    "config": ("LoaderConfig",),
    "cursors": ("LaneCursor",),
    "device": ("DeviceTransform",),
    "errors": ("DataConfigError", "DataError", "ShardError", "StorageError", "TarError"),
    "eval_reader": (
        "EvalBatch",
        "class_folders_of",
        "class_names_of",
        "read_labelled",
        "read_lines",
        "read_pairs",
        "templates_of",
    ),
    "files": ("read_file", "write_file"),
    "folder_source": ("folder_shards",),
    "loader": ("TrainLoader", "build_train_loader", "run_preflight"),
    "order": ("lanes_per_rank",),
    "preflight": ("check_storage", "preflight"),
    "preflight_report": ("PreflightReport",),
    "rows": ("CsvConfig",),
    "samples": ("RawSample", "SampleError", "SampleId"),
    "shard_index": ("ShardIndex", "build_index", "index_url"),
    "sizes": ("count_samples", "shard_name", "sizes_url", "total_samples"),
    "stats": ("LoaderStats", "source_epochs"),
    "storage": ("ByteStream", "open_stream", "probe"),
    "synthetic": ("synthetic_shards",),
    "table": ("table_shards",),
    "tar": ("read_samples",),
    "urls": ("Source", "dataset_type_of", "expand_sources", "is_local", "is_pipe", "local_path", "mask_url"),
    "where": ("Filter", "Where"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AugmentConfig",
    "Batch",
    "ByteStream",
    "CaptionConfig",
    "Catalog",
    "CsvConfig",
    "DataConfigError",
    "DataError",
    "DeviceTransform",
    "EvalBatch",
    "Filter",
    "LaneCursor",
    "LoaderConfig",
    "LoaderStats",
    "Position",
    "PreflightReport",
    "RawSample",
    "SampleError",
    "SampleId",
    "ShardError",
    "ShardIndex",
    "Source",
    "StorageError",
    "TarError",
    "TrainLoader",
    "Where",
    "build_index",
    "build_train_loader",
    "check_storage",
    "class_folders_of",
    "class_names_of",
    "count_samples",
    "dataset_type_of",
    "expand_sources",
    "folder_shards",
    "index_url",
    "is_local",
    "is_pipe",
    "lanes_per_rank",
    "local_path",
    "mask_url",
    "open_catalog",
    "open_stream",
    "parse_aug_cfg",
    "preflight",
    "probe",
    "read_file",
    "read_labelled",
    "read_lines",
    "read_pairs",
    "read_samples",
    "run_preflight",
    "shard_name",
    "sizes_url",
    "source_epochs",
    "sources_of",
    "synthetic_shards",
    "table_shards",
    "templates_of",
    "total_samples",
    "write_file",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'data' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"data.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
