"""From costs, machines and assumptions to the numbers of a run. Arithmetic only: builds nothing and reads nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from training.config import TrainConfig
from training.dry_run import loss_bytes
from training.forecast.costs import Costs
from training.forecast.hardware import Cluster
from training.plan import Plan
from training.precision import autocast_dtype

# A backward pass takes twice its forward pass; recomputation is work, but not work that the model asks for, so that
# utilisation is counted without it (Chowdhery et al. 2022, "PaLM", appendix B).
_FLOPS_OF_STEP = 3
_MOMENTS = 2
_FP32 = 4


@dataclass(frozen=True)
class Assumptions:
    """What no model and no data sheet says.

    utilisation: model FLOPs per second, as a share of the GPU's peak (MFU). sample_bytes: of a pair in its shard.
    decodes_per_core: pictures that a core decodes and resizes in a second.
    """

    utilisation: float
    sample_bytes: int
    decodes_per_core: float


@dataclass(frozen=True)
class Forecast:
    """Sizes in bytes, times in seconds, rates per second; of the whole run unless a name says otherwise."""

    memory: Mapping[str, int]  # of a GPU, by part
    free_bytes: int  # of a GPU; negative when the run does not fit
    samples_per_second: float
    step_s: float
    gradient_s: float  # of a step, if nothing hid it
    run_s: float
    gpu_hours: float
    read_bytes_per_second: float
    cores_per_node: float
    checkpoint_bytes: int
    total_flops: float

    @property
    def fits(self) -> bool:
        return self.free_bytes >= 0


def predict(
    config: TrainConfig, plan: Plan, costs: Costs, embed_dim: int, cluster: Cluster, given: Assumptions
) -> Forecast:
    """The run that `config` and `plan` describe, on `cluster`."""
    memory = memory_by_part(config, plan, costs, embed_dim)
    rate = cluster.num_gpus * cluster.gpu.peak_flops * given.utilisation / (_FLOPS_OF_STEP * costs.sample_flops)
    samples = plan.total_steps * plan.global_batch
    run_s = samples / rate
    moments = _MOMENTS * _FP32 * costs.num_parameters
    return Forecast(
        memory=memory,
        free_bytes=cluster.gpu.memory_bytes - sum(memory.values()),
        samples_per_second=rate,
        step_s=plan.global_batch / rate,
        gradient_s=_gradient_traffic(config, costs, cluster) * 8 / (cluster.link_gbit * 1e9),
        run_s=run_s,
        gpu_hours=run_s * cluster.num_gpus / 3600,
        read_bytes_per_second=rate * given.sample_bytes,
        cores_per_node=rate / cluster.num_nodes / given.decodes_per_core,
        checkpoint_bytes=costs.weight_bytes + moments,
        total_flops=_FLOPS_OF_STEP * costs.sample_flops * samples,
    )


def memory_by_part(config: TrainConfig, plan: Plan, costs: Costs, embed_dim: int) -> dict[str, int]:
    """Bytes of a GPU by what they hold. What an allocator and libraries keep beyond is not in it."""
    state = _FP32 * costs.num_parameters
    shards = plan.world_size if config.cluster.fsdp else 1
    parts = {
        "weights": costs.weight_bytes // shards,
        "gradients": state // shards,
        "moments": _MOMENTS * state // shards,
        "activations": costs.activation_bytes,
        "loss": loss_bytes(plan, embed_dim),
    }
    if shards > 1:
        # The block at work and the one fetched ahead, and the whole gradient of one.
        in_bf16 = autocast_dtype(config.model.precision) is not None
        parts["gathered blocks"] = 2 * costs.block_bytes // (2 if in_bf16 else 1) + costs.block_bytes
    return parts


def _gradient_traffic(config: TrainConfig, costs: Costs, cluster: Cluster) -> float:
    """Bytes that a GPU sends over the network in a step: a ring moves nearly all of it, in and out."""
    if cluster.num_nodes == 1:
        return 0.0
    share = (cluster.num_gpus - 1) / cluster.num_gpus
    gradient = costs.num_parameters * (2 if config.cluster.grad_reduce_dtype == "bf16" else _FP32)
    if not config.cluster.fsdp:
        return 2 * share * gradient
    gathers = 1 if config.cluster.fsdp_no_reshard_after_forward else 2
    gathered = costs.num_parameters * (2 if autocast_dtype(config.model.precision) is not None else _FP32)
    return share * (gradient + gathers * gathered)
