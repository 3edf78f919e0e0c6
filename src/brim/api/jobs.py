"""The job as it was said: model, devices and data read from outside, defaults filled in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from brim.errors import InvalidInput, quoted
from brim.planner.job import Job, build_job
from brim.planner.options import JobOptions
from brim.spec.device import Cluster
from brim.spec.model import ModelShape


def read_job(model: str | ModelShape, options: JobOptions, *, known_only: bool = True) -> Job:
    """Return the job, with where model and devices were read from as its first assumptions."""
    from brim.readers.hardware import read_cluster

    shape, origin, config = read_shape(model, refresh=bool(options.refresh), known_only=known_only)
    cluster, hardware = read_cluster(options.gpu or "auto", num_nodes=options.num_nodes or 1)
    found = f"gpu {hardware}" if options.gpu else f"gpu auto: {hardware}"
    options, counted = _count_sequences(options)
    said = (*origin, found, *counted)
    job, filled = _build_job(shape, cluster, options, config)
    return replace(job, assumptions=(*said, *filled, *job.assumptions), config=config)


def _build_job(
    shape: ModelShape, cluster: Cluster, options: JobOptions, config: Mapping[str, Any]
) -> tuple[Job, tuple[str, ...]]:
    """Return the job, planned on the quantised weights that a checkpoint holds, and what was filled in for them."""
    if config.get("quantization_config"):
        from brim.readers.quantization import follow_checkpoint, keep_storage, read_quantization

        stored = read_quantization(config, name=shape.name)
        if stored is not None:
            options, filled = follow_checkpoint(options, stored, shape.name)
            return keep_storage(build_job(shape, cluster, options), stored), filled
    return build_job(shape, cluster, options), ()


def _count_sequences(options: JobOptions) -> tuple[JobOptions, tuple[str, ...]]:
    """Return the options with the rows of a dataset file counted, unless the user said how many there are."""
    if options.dataset is None:
        return options, ()
    from brim.readers.dataset import find_file, read_dataset

    name, file = options.dataset, find_file(options.dataset)
    if file is not None:  # the script that is exported may be started from another folder
        options = replace(options, dataset=os.path.abspath(file))
    if options.dataset_size is not None:
        return options, ()
    rows, sentence = read_dataset(name, packing=bool(options.packing))
    return replace(options, dataset_size=rows), (sentence,) if sentence else ()


def read_shape(
    model: str | ModelShape, *, refresh: bool, known_only: bool
) -> tuple[ModelShape, tuple[str, ...], Mapping[str, Any]]:
    """Return the shape, where it was read from, and the config it was read from."""
    if isinstance(model, ModelShape):
        return model, (), {}
    if not isinstance(model, str) or not model.strip() or not model.isprintable():
        raise InvalidInput(f"model must be a hub id, a folder, a config.json or a size such as 7B, not {quoted(model)}")
    from brim.readers.headless import give_head
    from brim.readers.sources import read_checkpoint

    shape, origin, config = read_checkpoint(model, refresh=refresh, known_only=known_only)
    shape, said = give_head(shape, config)
    return shape, (f"model {origin}", *said), config
