"""Pure array maths: unreduced losses with keyword-only hyper-parameters; no model, no mesh, no logging inside."""

from jaxllm.losses.distill import chunked_generalized_jsd, chunked_top_k, chunked_top_k_jsd, generalized_jsd, top_k_jsd
from jaxllm.losses.logprobs import chunked_cross_entropy, chunked_token_logprobs, token_logprobs
from jaxllm.losses.supervised import constant_weights, cross_entropy, sequence_weights, token_weights

__all__ = [
    "chunked_cross_entropy",
    "chunked_generalized_jsd",
    "chunked_token_logprobs",
    "chunked_top_k",
    "chunked_top_k_jsd",
    "constant_weights",
    "cross_entropy",
    "generalized_jsd",
    "sequence_weights",
    "token_logprobs",
    "token_weights",
    "top_k_jsd",
]
