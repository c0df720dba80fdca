"""jaxllm takes a language model from raw text to a trained, exactly resumable checkpoint.

The dimension key. An array of known rank carries its shape in its name, one letter per dimension:

    B  sequences               T  positions              S  key or cache positions
    D  model width             F  mlp width              V  vocabulary
    N  query heads             K  key-value heads        G  query heads per key-value head
    H  head width              L  layers                 M  micro-batches
    P  prompts                 C  completions per prompt (B = P * C)
    R  LoRA rank               E  experts, or a teacher's width
    J  outcomes: a teacher's K likeliest tokens, and any other

``tokens_BT`` is a rank-2 array of token ids, ``q_BTNH`` the queries. Einsums use the same letters in lower case
(``'btd,dnh->btnh'``), and so do ``sharding.spec('btd')`` and the sharding rules of the parameters (``'ldnh'``).
"""
