"""What a run will take, before anything is rented: memory, time, traffic. Builds no model and knows no rank."""

from __future__ import annotations

from training.forecast.costs import Costs, measure_costs
from training.forecast.hardware import GPUS, Cluster
from training.forecast.prediction import Assumptions, Forecast, predict

__all__ = ["GPUS", "Assumptions", "Cluster", "Costs", "Forecast", "measure_costs", "predict"]
