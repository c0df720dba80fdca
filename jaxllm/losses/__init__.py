"""Pure array maths: unreduced losses with keyword-only hyper-parameters; no model, no mesh, no logging inside."""

from jaxllm.losses.advantages import gae, group_advantages, leave_one_out_advantages, whiten
from jaxllm.losses.distill import chunked_generalized_jsd, chunked_top_k, chunked_top_k_jsd, generalized_jsd, top_k_jsd
from jaxllm.losses.logprobs import chunked_cross_entropy, chunked_token_logprobs, token_logprobs
from jaxllm.losses.policy import cispo, gspo_clip, kl_k1, kl_k2, kl_k3, ppo_clip, value_clip
from jaxllm.losses.preference import dpo, hinge, ipo, kto, log_ratio_margin, orpo, robust_dpo, simpo
from jaxllm.losses.reward import bradley_terry, score_regression
from jaxllm.losses.supervised import constant_weights, cross_entropy, sequence_weights, token_weights

__all__ = [
    "bradley_terry",
    "chunked_cross_entropy",
    "chunked_generalized_jsd",
    "chunked_token_logprobs",
    "chunked_top_k",
    "chunked_top_k_jsd",
    "cispo",
    "constant_weights",
    "cross_entropy",
    "dpo",
    "gae",
    "generalized_jsd",
    "group_advantages",
    "gspo_clip",
    "hinge",
    "ipo",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kto",
    "leave_one_out_advantages",
    "log_ratio_margin",
    "orpo",
    "ppo_clip",
    "robust_dpo",
    "score_regression",
    "sequence_weights",
    "simpo",
    "token_logprobs",
    "token_weights",
    "top_k_jsd",
    "value_clip",
    "whiten",
]
