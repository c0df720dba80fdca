"""The model: modules inside, pure functions over plain dicts outside. The only home of Flax."""

from jaxllm.model.config import DecoderConfig, RopeConfig
from jaxllm.model.decoder import Model, build, parameter_rules, placement, policy, with_scalar_head
from jaxllm.model.flops import flops_per_token

__all__ = [
    "DecoderConfig",
    "Model",
    "RopeConfig",
    "build",
    "flops_per_token",
    "parameter_rules",
    "placement",
    "policy",
    "with_scalar_head",
]
