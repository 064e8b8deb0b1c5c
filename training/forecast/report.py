"""A forecast in words, line by line; and how a run compares with it."""

from __future__ import annotations

from collections.abc import Iterator

from training.forecast.costs import Costs
from training.forecast.hardware import Cluster
from training.forecast.pace import Pace, seconds_left, utilisation
from training.forecast.prediction import Assumptions, Forecast
from training.plan import Plan

_DAY_S = 86_400.0


def describe(
    model: str, plan: Plan, costs: Costs, cluster: Cluster, given: Assumptions, forecast: Forecast
) -> Iterator[str]:
    """What the run will take. What was stated and not computed says so."""
    yield (
        f"model: {model}, {costs.num_parameters / 1e6:,.2f} M parameters, {costs.sample_flops / 1e9:,.1f} GFLOP "
        "a pair forward"
    )
    yield f"cluster: {cluster}"
    yield f"plan: {plan}"
    yield _memory(cluster, forecast)
    yield (
        f"speed: {forecast.samples_per_second:,.0f} samples/s at the stated {given.utilisation:.1%} of "
        f"{cluster.gpu.peak_flops / 1e12:.0f} TFLOP/s, {forecast.step_s:.2f} s a step; gradients need "
        f"{forecast.gradient_s:.2f} s of it on the network, if nothing hides them"
    )
    samples = plan.total_steps * plan.global_batch
    yield (
        f"duration: {forecast.run_s / _DAY_S:.1f} days, {forecast.gpu_hours:,.0f} GPU-hours; "
        f"{samples / 1e9:.2f} G samples, {forecast.total_flops / 1e21:.2f} ZFLOP"
    )
    node_gbit = forecast.read_bytes_per_second * 8 / 1e9 / cluster.num_nodes
    yield (
        f"data: {forecast.read_bytes_per_second / 1e9:.2f} GB/s from storage; on a node {node_gbit:.2f} Gbit/s and "
        f"{forecast.cores_per_node:.1f} cores that decode"
    )
    yield f"checkpoint: {forecast.checkpoint_bytes / 1e9:.1f} GB each, and as much host memory on the first node"
    if not forecast.fits:
        yield "it does not fit: lower --batch-size, or add --grad-checkpointing or --fsdp"


def compare(pace: Pace, plan: Plan, given: Assumptions, forecast: Forecast) -> Iterator[str]:
    """The run's pace beside the forecast's."""
    total = plan.total_steps * plan.global_batch
    yield (
        f"run: {pace.samples_per_second:,.0f} samples/s, the median of {pace.num_records} records after the first "
        f"step, {pace.samples_per_second / forecast.samples_per_second:.2f} of the forecast: "
        f"{utilisation(pace, forecast, given.utilisation):.2%} of the peak, "
        f"{pace.data_share:.0%} of a step waiting for data"
    )
    yield (
        f"at this pace: {seconds_left(pace, total) / _DAY_S:.1f} days left of "
        f"{total / pace.samples_per_second / _DAY_S:.1f}"
    )


def _memory(cluster: Cluster, forecast: Forecast) -> str:
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in forecast.memory.items())
    left = forecast.free_bytes
    rest = f"{_gib(left)} left for what libraries and the allocator keep" if left >= 0 else f"{_gib(-left)} too much"
    total = sum(forecast.memory.values())
    return f"memory of a GPU: {_gib(total)} of {_gib(cluster.gpu.memory_bytes)} GiB: {parts}; {rest}"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f}"
