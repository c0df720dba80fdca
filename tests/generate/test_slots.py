"""Requests in refilled slots: against whole forward passes, each other's order, a schedule made by hand, and meshes."""

import collections
import heapq

import jax
import numpy as np
import pytest

from jaxllm import sharding
from jaxllm.generate import Request, SamplerConfig, completions, programs, sample
from jaxllm.generate import slots as module
from jaxllm.generate.slots import bucket
from jaxllm.losses import token_logprobs
from jaxllm.model import parameter_rules

GREEDY = SamplerConfig(temperature=0.0)
SAMPLER = SamplerConfig(temperature=0.8, top_k=12)
KEY = jax.random.key(3)


def requests(count=12, seed=0):
    """Prompts of 1 to 19 tokens, each asked twice in a row, with limits from 1 to 24."""
    draw = np.random.default_rng(seed)
    prompts = [draw.integers(4, 40, draw.integers(1, 20)).tolist() for _ in range(count // 2)]
    return [Request(number, prompts[number // 2], int(draw.integers(1, 25))) for number in range(count)]


ASKED = requests()


@pytest.fixture
def small(monkeypatch):
    """Caches that grow and shrink at sizes that are tested quickly."""
    monkeypatch.setattr(module, "FEWEST_SLOTS", 2)
    monkeypatch.setattr(module, "FEWEST_POSITIONS", 24)


@pytest.fixture(scope="module")
def model_and_params(tiny, built):
    return built(tiny())


def answers(model_and_params, asked=ASKED, key=KEY, **options):
    """Number -> completion."""
    how = dict(slots=4, length=48, sampler=SAMPLER, stop_ids=(3,)) | options
    found = list(completions(*model_and_params, collections.deque(asked), key, **how))
    assert sorted(completion.number for completion in found) == sorted(request.number for request in asked)
    return {completion.number: completion for completion in found}


@pytest.fixture(scope="module")
def alone(model_and_params):
    """Each request by itself, in the order of their numbers."""
    return answers(model_and_params, slots=1)


def same(found, expected):
    for number, completion in found.items():
        np.testing.assert_array_equal(completion.tokens, expected[number].tokens)
        np.testing.assert_allclose(completion.logp, expected[number].logp, atol=1e-4)
        assert completion.ended == expected[number].ended


@pytest.fixture
def recorded(monkeypatch):
    """A function: name of a program -> [(arguments, result)] of its calls from then on, in a list that grows."""

    def record(name):
        calls, program = [], getattr(programs, name)

        def run(*arguments, **options):
            shapes = jax.tree.map(np.shape, arguments)
            calls.append((shapes, result := program(*arguments, **options)))
            return result

        monkeypatch.setattr(programs, name, run)
        return calls

    return record


def test_every_token_is_drawn_from_the_forward_pass_by_number_position_and_key(model_and_params):
    model, params = model_and_params
    asked = [request._replace(number=7 * request.number + 1) for request in ASKED]
    found = answers((model, params), asked)
    texts = np.zeros((len(asked), 44), np.int32)
    for row, (number, prompt, _) in enumerate(asked):
        texts[row, : len(prompt)] = prompt
        texts[row, len(prompt) :][: len(found[number].tokens)] = found[number].tokens
    logits_BTV = np.asarray(jax.jit(model.forward)(params, texts))
    numbers = np.array([request.number for request in asked])
    draw = jax.jit(lambda logits_BV, position_B: sample(logits_BV, numbers, position_B, KEY, sampler=SAMPLER)[0])
    drawn_BT = np.stack([draw(logits_BTV[:, t], np.full(len(asked), t + 1)) for t in range(44)], axis=1)
    logp_BT = token_logprobs(logits_BTV[:, :-1] / SAMPLER.temperature, texts[:, 1:])
    for row, (number, prompt, most) in enumerate(asked):
        tokens, start = found[number].tokens.tolist(), len(prompt) - 1
        assert tokens == drawn_BT[row, start:][: len(tokens)].tolist()
        np.testing.assert_allclose(found[number].logp, logp_BT[row, start:][: len(tokens)], atol=1e-4)
        assert 3 not in tokens[:-1] and found[number].ended == (tokens[-1] == 3)
        assert len(tokens) == most or found[number].ended
        assert (found[number].tokens.dtype, found[number].logp.dtype) == (np.int32, np.float32)
    assert {completion.ended for completion in found.values()} == {True, False}


@pytest.mark.parametrize("slots", [3, 4])
def test_slots_order_and_neighbours_change_nothing(slots, model_and_params, alone, small):
    draw = np.random.default_rng(slots)
    mixed = [ASKED[index] for index in draw.permutation(len(ASKED))]
    same(answers(model_and_params, mixed, slots=slots), alone)
    same(answers(model_and_params, mixed[:5], slots=slots), alone)


def test_another_key_number_or_prompt_draws_otherwise(model_and_params, alone):
    other_key = answers(model_and_params, key=jax.random.key(4))
    other_number = answers(model_and_params, [request._replace(number=request.number + 12) for request in ASKED])
    for other in (other_key.values(), other_number.values()):
        pairs = zip(sorted(other), alone.values(), strict=True)
        assert sum(a.tokens.tolist() == b.tokens.tolist() for a, b in pairs) <= 4


def test_greedy_requests_with_the_same_prompt_get_the_same_answer(model_and_params):
    found = answers(model_and_params, sampler=GREEDY)
    for first, second in zip(ASKED[::2], ASKED[1::2], strict=True):
        a, b = found[first.number].tokens.tolist(), found[second.number].tokens.tolist()
        assert a[: len(b)] == b[: len(a)]


@pytest.mark.parametrize("shape", [(1, 4, 2), (2, 2, 2)])
def test_every_mesh_samples_what_one_device_does_while_slots_fill_grow_and_shrink(
    shape, model_and_params, small, make_mesh, recorded, monkeypatch
):
    monkeypatch.setattr(module, "FEWEST_POSITIONS", 16)
    model, params = model_and_params
    limits = (1, 1, 1, 1, 2, 1, 3, 1, 3)
    asked = [request._replace(max_new_tokens=limit) for request, limit in zip(ASKED, limits, strict=False)]
    alone = answers((model, params), asked, slots=1)
    mesh, moved = make_mesh(*shape), recorded("resized")
    placed = jax.device_put(params, sharding.parameter_shardings(parameter_rules(model.config), params, mesh))
    with jax.set_mesh(mesh):
        same(answers((model, placed), asked, slots=7), alone)
    # Seven slots are eight, then four; sixteen positions become more.
    assert {rows for (_, rows), _ in moved} == {None, (4,)}


# ---- refilling ----


def schedule(limits, slots):
    """How many steps it takes when each request takes the slot that falls idle first."""
    idle = [0] * slots
    for limit in limits:
        heapq.heappush(idle, heapq.heappop(idle) + limit)
    return max(idle)


def steps(advanced):
    return sum(int(drawn.mask_BT.any(axis=0).sum()) for _, (_, drawn) in advanced)


@pytest.mark.parametrize("slots", [3, 4])
def test_no_slot_waits_while_requests_do(slots, model_and_params, recorded):
    advanced, limits = recorded("advanced"), [request.max_new_tokens for request in ASKED]
    answers(model_and_params, slots=slots, stop_ids=())
    assert steps(advanced) == schedule(limits, slots)
    batches = [limits[start : start + slots] for start in range(0, 12, slots)]
    assert steps(advanced) < sum(map(max, batches))


def test_many_slots_wait_for_a_few_before_they_are_refilled(model_and_params, recorded, monkeypatch):
    monkeypatch.setattr(module, "WORTH_A_LOOK", 1.5)
    advanced, limits = recorded("advanced"), [1, 9, 2, 8, 1, 1]
    asked = [Request(number, [5, 6], limit) for number, limit in enumerate(limits)]
    answers(model_and_params, asked, slots=4, stop_ids=())
    # Two slots of four are worth a look: those with 1 and 2 tokens fall idle together, and then nobody waits.
    assert [int(drawn.mask_BT.any(axis=0).sum()) for _, (_, drawn) in advanced] == [2, 7]


def test_neighbours_share_one_reading_of_their_prompt(model_and_params, recorded):
    read = recorded("prefilled")
    asked = [Request(number, [4 + number // 4] * (3 + number // 4), 3) for number in range(8)]
    answers(model_and_params, asked, slots=3)
    assert [shapes[2] for shapes, _ in read] == [(8, 16)]
    read.clear()
    answers(model_and_params, asked[:4], slots=3)
    assert [shapes[2] for shapes, _ in read] == [(1, 16)]
    # Ten prompts in a row: eight are read, though there is room for three, and then the last two.
    read.clear()
    answers(model_and_params, [Request(number, [4 + number] * 3, 2) for number in range(10)], slots=3)
    assert len(read) == 2


def test_the_cache_is_as_large_as_what_is_in_it(model_and_params, small, recorded):
    advanced = recorded("advanced")
    asked = [Request(number, [5], 4 if number < 3 else 40) for number in range(4)]
    answers(model_and_params, asked, stop_ids=(), length=512)
    # Four slots until three are idle, then two; 32 more tokens fit 36 positions, and 36 more 48.
    assert [shapes[2][0]["key"][::2] for shapes, _ in advanced] == [(4, 36), (2, 36), (2, 48)]
    advanced.clear()
    answers(model_and_params, asked[-1:], stop_ids=(), length=512)
    assert [shapes[2][0]["key"][::2] for shapes, _ in advanced] == [(2, 36), (2, 48)]


def test_buckets_are_powers_of_two_and_one_and_a_half_of_them():
    assert sorted({bucket(length, 16) for length in range(129)}) == [16, 24, 32, 48, 64, 96, 128]
    assert [bucket(length, 16) for length in (16, 17, 24, 25, 33, 48, 49)] == [16, 24, 24, 32, 48, 48, 64]


# ---- conversations ----


def test_a_conversation_goes_on_as_a_request_with_the_same_number(model_and_params):
    """Each answer is followed by a tool's, three times over; the last is appended when nothing else is left."""
    firsts = [Request(number, [5 + number], 3 + number) for number in range(3)]
    queue, heard = collections.deque(firsts), {request.number: [request.prompt] for request in firsts}
    how = dict(slots=3, length=48, sampler=SAMPLER, stop_ids=(3,))
    for number, tokens, _, _ in completions(*model_and_params, queue, KEY, **how):
        whole = [*heard[number][-1], *tokens.tolist(), 30]
        heard[number].append(whole)
        if len(heard[number]) < 4:
            queue.append(Request(number, whole, 2))
    for first in firsts:
        prompts, most = heard[first.number], [first.max_new_tokens, 2, 2]
        assert len(prompts) == 4
        for prompt, answer, limit in zip(prompts, prompts[1:], most, strict=False):
            (expected,) = answers(model_and_params, [Request(first.number, prompt, limit)], slots=3).values()
            assert answer == [*prompt, *expected.tokens.tolist(), 30]


def test_the_cache_grows_again_for_requests_that_come_late(model_and_params, alone, small, recorded):
    queue, late, advanced = collections.deque(ASKED[:1]), list(ASKED[1:6]), recorded("advanced")
    found = {}
    for completion in completions(*model_and_params, queue, KEY, slots=4, length=48, sampler=SAMPLER, stop_ids=(3,)):
        found[completion.number] = completion
        queue.extend(late)
        late.clear()
    assert sorted(found) == [0, 1, 2, 3, 4, 5]
    same(found, alone)
    rows = [shapes[2][0]["key"][0] for shapes, _ in advanced]
    assert rows[0] == 2 and max(rows) == 4


def test_an_empty_queue_gives_nothing(model_and_params):
    assert answers(model_and_params, []) == {}


# ---- errors ----


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(5, [4] * 40, 9), "request 5: a prompt of 40 tokens and max_new_tokens=9 do not fit length=48"),
        (Request(5, [], 9), "request 5 has an empty prompt; give it its <|bos|>"),
        (Request(5, [4], 0), "request 5: max_new_tokens=0 must be at least 1"),
        (Request(5, [4, 40], 1), "request 5 has ids from 4 to 40, but model.vocab_size=40"),
        (Request(5, [-1, 4], 1), "request 5 has ids from -1 to 4"),
        (Request(-5, [4], 1), "request -5: its number must be from 0"),
    ],
)
def test_a_request_that_does_not_fit_is_refused_before_anything_is_sampled(request_, message, model_and_params):
    queue = collections.deque([*ASKED, request_])
    with pytest.raises(ValueError, match=message):
        completions(*model_and_params, queue, KEY, slots=4, length=48)
    assert len(queue) == 13
    late = collections.deque(ASKED[:1])
    with pytest.raises(ValueError, match=message):
        for _ in completions(*model_and_params, late, KEY, slots=4, length=48):
            late.append(request_)


def test_slots_below_one_are_refused(model_and_params):
    with pytest.raises(ValueError, match="slots=0 must be at least 1"):
        answers(model_and_params, slots=0)


# ---- programs ----


def test_a_hundred_prompts_of_any_length_compile_once_per_bucket(tiny, built):
    model_and_params = built(tiny(mlp_width=20))
    draw, counted = np.random.default_rng(3), ("prefilled", "with_rows", "advanced", "resized")
    before = [getattr(programs, name)._cache_size() for name in counted]
    asked = [Request(number, [5] * int(draw.integers(1, 33)), int(draw.integers(1, 49))) for number in range(100)]
    for start in range(0, 100, 20):
        answers(model_and_params, asked[start : start + 20], length=96)
    compiled = [getattr(programs, name)._cache_size() - old for name, old in zip(counted, before, strict=True)]
    # Prompts of three buckets (16, 24, 32); caches for 64 and for 96 positions.
    assert compiled[0] <= 3 and compiled[1] <= 6 and compiled[2:] == [2, 1]
