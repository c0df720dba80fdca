"""Objectives, optimizers and the one update: pure functions from state and batch to state and metrics."""

from jaxllm.train.objectives import next_token
from jaxllm.train.optimizer import OptimizerConfig, optimizer, schedule
from jaxllm.train.update import TrainState, update

__all__ = ["OptimizerConfig", "TrainState", "next_token", "optimizer", "schedule", "update"]
