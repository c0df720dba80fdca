"""The compiled loop over tokens: one loop, in place, without a sort."""

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxllm.generate import SamplerConfig, programs
from jaxllm.generate.programs import CHUNK, Turn

KEY = jax.random.key(7)


def count(jaxpr, name):
    """How many equations of this primitive a jaxpr has, those inside other equations included."""
    inner = (sub for equation in jaxpr.eqns for sub in jaxprs_in_params(equation.params))
    return sum(equation.primitive.name == name for equation in jaxpr.eqns) + sum(count(sub, name) for sub in inner)


def arguments(model, params, left=(9, 4), length=64):
    params = programs.ready(model, params)
    turn = Turn(np.array([5, 6]), np.array([3, 1]), np.array(left), np.array([0, 1]))
    return model, params, programs.empty(model, 2, length), jax.tree.map(np.int32, turn), KEY


def traced(model, params, sampler, **how):
    return programs.advanced.trace(*arguments(model, params, **how), CHUNK, 0, sampler=sampler, stop_ids=(3,))


def drawn(model_and_params, limit, pause, *, stop_ids=(), left=(9, 4)):
    how = dict(sampler=SamplerConfig(), stop_ids=stop_ids)
    return programs.advanced(*arguments(*model_and_params, left=left), limit, pause, **how)[1]


def test_the_tokens_are_one_while_loop_that_hands_no_cache_through_a_scan(tiny, built):
    jaxpr = traced(*built(tiny()), SamplerConfig()).jaxpr.jaxpr
    assert count(jaxpr, "while") == 1
    assert count(jaxpr, "scan") == 0


@pytest.mark.parametrize(
    "sampler", [SamplerConfig(temperature=0.0), SamplerConfig(), SamplerConfig(top_k=5, top_p=0.9, min_p=0.01)]
)
def test_nothing_sorts_in_the_sampler(sampler, tiny, built):
    hlo = traced(*built(tiny()), sampler).lower().compile().as_text()
    assert " sort(" not in hlo and "topk" not in hlo.lower()


def test_the_cache_is_updated_in_place(tiny, built):
    def bytes_of(length):
        memory = traced(*built(tiny()), SamplerConfig(), length=length).lower().compile().memory_analysis()
        return np.array([memory.temp_size_in_bytes, memory.alias_size_in_bytes])

    temporary, donated = bytes_of(1024) - bytes_of(64)
    # What grows are the scores of one query, not a copy of a layer's keys or values (a quarter of the cache).
    assert donated > 0 and temporary < 0.2 * donated


def test_the_loop_ends_at_its_limit_or_as_soon_as_few_slots_go_on(tiny, built):
    model_and_params = built(tiny())
    lengths = {
        (limit, pause): drawn(model_and_params, limit, pause).mask_BT.sum(axis=1).tolist()
        for limit, pause in ((CHUNK, 0), (CHUNK, 1), (3, 0), (1, 1), (CHUNK + 5, 0))
    }
    assert lengths == {
        (CHUNK, 0): [9, 4],
        (CHUNK, 1): [4, 4],
        (3, 0): [3, 3],
        (1, 1): [1, 1],
        (CHUNK + 5, 0): [9, 4],
    }
    assert drawn(model_and_params, CHUNK + 5, 0, left=(50, 4)).mask_BT.sum(axis=1).tolist() == [CHUNK, 4]


def test_a_slot_ends_with_a_stop_token_and_every_token_may_be_one(tiny, built):
    model_and_params = built(tiny())
    assert drawn(model_and_params, CHUNK, 0, stop_ids=tuple(range(40))).mask_BT.sum(axis=1).tolist() == [1, 1]
    free = drawn(model_and_params, CHUNK, 0)
    stop = int(free.tokens_BT[0, 2])
    cut = drawn(model_and_params, CHUNK, 0, stop_ids=(stop, 39))
    row = free.tokens_BT[0, :9].tolist()
    end = min(row.index(token) + 1 for token in (stop, 39) if token in row)
    assert cut.mask_BT.sum(axis=1)[0] == end
    np.testing.assert_array_equal(cut.tokens_BT[0, :end], free.tokens_BT[0, :end])
