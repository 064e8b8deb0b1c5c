"""From costs to the numbers of a run: the published ones, and how they change with the settings."""

from __future__ import annotations

import dataclasses

import pytest

import models
from training.config import ClusterConfig, ModelConfig, OptimConfig, TrainConfig
from training.errors import ConfigError
from training.forecast import GPUS, Assumptions, Cluster, Costs, Forecast, measure_costs, predict
from training.plan import make_plan

GIVEN = Assumptions(utilisation=0.3, sample_bytes=30_000, decodes_per_core=400)


def forecast(
    costs: Costs, micro_batch: int, cluster: Cluster, given: Assumptions = GIVEN, **settings: bool | str
) -> Forecast:
    config = TrainConfig(
        model=ModelConfig(precision="amp_bf16"),
        optim=OptimConfig(batch_size=micro_batch, epochs=10),
        cluster=ClusterConfig(**settings),  # type: ignore[arg-type]
    )
    plan = make_plan(config.optim, 100_000_000, cluster.num_gpus)
    return predict(config, plan, costs, 1024, cluster, given)


@pytest.fixture(scope="module")
def huge() -> Costs:
    """ViT-H/14 with recomputation at 96 pairs a GPU, as it was published."""
    return measure_costs(models.load_model_config("ViT-H-14"), 96, "amp_bf16", True, 77)


@pytest.mark.parametrize(
    ("utilisation", "num_gpus", "published"),
    [(0.154, 824, 34_608)],
)
def test_the_published_rate_of_a_vit_h_follows_from_its_utilisation(
    huge: Costs, utilisation: float, num_gpus: int, published: float
) -> None:
    """LAION's scaling-laws table: 824 A100 of 40 GB; the utilisation has three digits."""
    given = dataclasses.replace(GIVEN, utilisation=utilisation)
    found = forecast(huge, 96, Cluster(GPUS["a100-40"], num_gpus), given)
    assert found.samples_per_second == pytest.approx(published, rel=0.01)
    assert found.fits
    assert found.gpu_hours == pytest.approx(num_gpus * found.run_s / 3600)
    assert found.read_bytes_per_second == pytest.approx(published * 30_000, rel=0.01)


def test_a_vit_h_without_recomputation_does_not_fit_where_it_does_with_it(huge: Costs) -> None:
    costs = measure_costs(models.load_model_config("ViT-H-14"), 96, "amp_bf16", False, 77)
    cluster = Cluster(GPUS["a100-40"], 64)
    assert forecast(huge, 96, cluster).fits
    assert not forecast(costs, 96, cluster).fits


def test_shards_divide_the_state_and_add_blocks_at_work(huge: Costs) -> None:
    cluster = Cluster(GPUS["a100-80"], 64)
    whole, sharded = (forecast(huge, 96, cluster, fsdp=fsdp).memory for fsdp in (False, True))
    for part in ("weights", "gradients", "moments"):
        assert sharded[part] == pytest.approx(whole[part] / 64, rel=1e-6)
    assert 0 < sharded["gathered blocks"] < whole["weights"]
    assert sharded["activations"] == whole["activations"]


def test_a_checkpoint_is_weights_and_two_moments(huge: Costs) -> None:
    assert forecast(huge, 96, Cluster(GPUS["h100"], 8)).checkpoint_bytes == pytest.approx(3 * 986.11e6 * 4, rel=1e-3)


def test_one_node_sends_no_gradients_over_the_network_and_bf16_sends_half(huge: Costs) -> None:
    many = Cluster(GPUS["h100"], 64)
    assert forecast(huge, 96, Cluster(GPUS["h100"], 8)).gradient_s == 0
    full, half = (forecast(huge, 96, many, grad_reduce_dtype=dtype).gradient_s for dtype in ("fp32", "bf16"))
    assert half == pytest.approx(full / 2)


def test_nodes_that_are_not_filled_are_refused() -> None:
    with pytest.raises(ConfigError, match="--gpus 12 does not fill nodes of 8 GPUs"):
        Cluster(GPUS["h100"], 12)
    assert Cluster(GPUS["h100"], 4).num_nodes == 1
