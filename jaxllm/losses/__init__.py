"""Pure array maths: unreduced losses with keyword-only hyper-parameters; no model, no mesh, no logging inside."""

from jaxllm.losses.logprobs import chunked_cross_entropy, chunked_token_logprobs, token_logprobs
from jaxllm.losses.supervised import constant_weights, cross_entropy, sequence_weights, token_weights

__all__ = [
    "chunked_cross_entropy",
    "chunked_token_logprobs",
    "constant_weights",
    "cross_entropy",
    "sequence_weights",
    "token_logprobs",
    "token_weights",
]
