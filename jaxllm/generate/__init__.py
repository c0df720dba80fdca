"""Sampling with an explicit cache of keys and values: requests from a queue in refilled slots, or a batch."""

from jaxllm.generate.batch import Completions, generate, stream
from jaxllm.generate.sampler import SamplerConfig, likely, sample
from jaxllm.generate.slots import Completion, Request, completions

__all__ = [
    "Completion",
    "Completions",
    "Request",
    "SamplerConfig",
    "completions",
    "generate",
    "likely",
    "sample",
    "stream",
]
