import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.scipy.special import expit

from jaxllm import sharding
from jaxllm.model import build, parameter_rules
from jaxllm.train import preferences
from jaxllm.train.preferences import LOSSES, PreferenceConfig, RewardConfig, preference, referred, reward
from jaxllm.train.update import init_state, update

T, PROMPT = 32, 3
DEFAULTS = dict(
    loss="dpo", beta=0.3, label_smoothing=0.0, gamma=0.4, length_normalised=False, sft_weight=0.0,
    desirable_weight=1.5, undesirable_weight=0.5, store_reference=False,
)  # fmt: skip
# Lengths of the answers of each pair of each row, 0 for an answer that is not there.
LENGTHS = [[(4, 2), (3, 5)], [(6, 6)], [(2, 0), (5, 3)], []]
GRADIENTS = {"dpo": dict(loss="dpo"), "kto": dict(loss="kto", sft_weight=0.2)}  # what is differentiated, for brevity
SCORE = {2: np.nan}  # an answer of 2 tokens has no score, one of n has the score n


def config(**changes):
    return PreferenceConfig(**(DEFAULTS | changes))


def documents(seed=0, vocab=40):
    """row -> pair -> (tokens of an answer behind its prompt, its length), two of each pair, or one."""
    draw = np.random.default_rng(seed)
    rows = []
    for pairs in LENGTHS:
        rows.append([])
        for lengths in pairs:
            prompt = draw.integers(1, vocab, PROMPT)
            ids = (np.concatenate([prompt, draw.integers(1, vocab, n + 1)]) for n in lengths)
            rows[-1].append([(each, n) for each, n in zip(ids, lengths, strict=True) if n])
    return rows


def batch_of(rows, M=1, length=T, swapped=False):
    """The rows as the loader gives them: of two answers the prompt is there once, without its last token, with which
    both begin; an answer's last token, behind its end, is no target.
    """
    names = ("tokens_BT", "targets_BT", "positions_BT", "segments_BT", "parents_BT")
    batch = {name: np.zeros((len(rows), length), np.int32) for name in names}
    batch["mask_BT"] = np.zeros((len(rows), length), bool)
    batch |= {name: np.zeros((len(rows), length), np.float32) for name in ("score_BT", "margin_BT")}
    for row, pairs in enumerate(rows):
        start = 0
        for number, answers in enumerate(pairs, 1):
            answers = answers[::-1] if swapped else answers
            shared = PROMPT - 1 if len(answers) == 2 else 0
            pieces = [(-number, answers[0][0][: shared + 1], 0, 0)] if shared else []
            pieces += [(2 * number - 1 + side, ids[shared:], shared, n) for side, (ids, n) in enumerate(answers)]
            for segment, ids, position, n in pieces:
                place = slice(start, start + len(ids) - 1)
                batch["tokens_BT"][row, place], batch["targets_BT"][row, place] = ids[:-1], ids[1:]
                batch["positions_BT"][row, place] = position + np.arange(len(ids) - 1)
                batch["segments_BT"][row, place] = segment
                batch["parents_BT"][row, place] = -number if shared else segment
                answer = start + PROMPT - 1 - position
                batch["mask_BT"][row, answer : answer + n] = True
                batch["score_BT"][row, place] = SCORE.get(n, n)
                batch["margin_BT"][row, place] = 0.1 * number if n else 0.0
                start = place.stop
    return {name: x.reshape(M, -1, length) for name, x in batch.items()}


def first(batch):
    return {name: x[0] for name, x in batch.items()}


@pytest.fixture(scope="module")
def models(tiny, built):
    """(model, policy, reference)."""
    model, params = built(tiny(dropout=0.1, num_layers=1))
    params = jax.tree.map(jnp.asarray, params)
    return model, params, jax.tree.map(lambda x: 1.2 * x, params)


def summed(model, of, function):
    """(params, batch, ref_params) -> (the prepared batch, the function of the objective summed over micro-batches)."""
    prepare, apply = referred(model, model, of), function(preference(model, of))

    def run(params, batch, ref_params):
        given = prepare(params, batch, ref_params=ref_params)
        return given, jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.lax.map(lambda part: apply(params, part), given))

    return run


@functools.cache
def measured(model):
    """(params, batch, ref_params) -> name of a loss, and whether of means -> (prepared batch, (loss, metrics)): one
    program for all.
    """
    runs = {(name, means): summed(model, of_loss(name, means), lambda objective: objective)
            for name in (*LOSSES, "kto") for means in (False, True)}  # fmt: skip
    return jax.jit(lambda *given: {key: run(*given) for key, run in runs.items()})


def of_loss(name, means=False):
    smoothing = 0.2 if "dpo" in name else 0.0
    return config(loss=name, label_smoothing=smoothing, length_normalised=means, sft_weight=0.7)


@functools.cache
def differentiated(model, of):
    """(params, batch, ref_params) -> (prepared batch, ((loss, metrics), gradients))."""
    return jax.jit(summed(model, of, functools.partial(jax.value_and_grad, has_aux=True)))


def alone(models):
    """pair -> [(log-probability of an answer, that under the reference, its length), ...], in float64, unpacked."""
    model, params, reference = models

    @jax.jit
    def every(params, ids_BT):
        return jax.nn.log_softmax(model.forward(params, ids_BT))

    def one(ids, n):
        padded = np.zeros((1, T), np.int32)
        padded[0, : len(ids)] = ids
        both = (np.float64(every(each, padded)[0]) for each in (params, reference))
        return *(sum(logp_TV[t - 1, ids[t]] for t in range(PROMPT, PROMPT + n)) for logp_TV in both), n

    return [[one(*answer) for answer in pair] for row in documents() for pair in row]


def log(x):
    return np.log(x)


ORACLES = {  # of one pair: chosen, rejected, their references, their means, and the config
    "dpo": lambda h, c, r, s: -log(expit(0.3 * h)) * (1 - s) - log(1 - expit(0.3 * h)) * s,
    "robust_dpo": lambda h, c, r, s: (-(1 - s) * log(expit(0.3 * h)) + s * log(1 - expit(0.3 * h))) / (1 - 2 * s),
    "ipo": lambda h, c, r, s: (h - 1 / 0.6) ** 2,
    "hinge": lambda h, c, r, s: max(0, 1 - 0.3 * h),
    "orpo": lambda h, c, r, s: -0.3 * log(expit(log(np.exp(c) / (1 - np.exp(c))) - log(np.exp(r) / (1 - np.exp(r))))),
    "simpo": lambda h, c, r, s: -log(expit(0.3 * (c - r) - 0.4)),
}


@pytest.mark.parametrize("means", [False, True])
@pytest.mark.parametrize("name", ORACLES)
def test_a_loss_is_that_of_each_pair_of_documents_read_alone(models, name, means):
    model, params, reference = models
    _, (loss, metrics) = measured(model)(params, batch_of(documents()), reference)[name, means]
    losses, margins, smoothing = [], [], of_loss(name).label_smoothing
    for pair in alone(models):
        if len(pair) == 2:
            (c, ref_c, nc), (r, ref_r, nr) = pair
            h = (c - ref_c) / (nc if means else 1) - (r - ref_r) / (nr if means else 1)
            losses.append(ORACLES[name](h, c / nc, r / nr, smoothing) + 0.7 * -c / nc)
            margins.append(c / nc - r / nr if name in ("orpo", "simpo") else h)
    assert len(losses) == 4
    np.testing.assert_allclose(loss, np.mean(losses), rtol=2e-5)
    np.testing.assert_allclose(metrics["loss"].value, np.mean(losses), rtol=2e-5)
    np.testing.assert_allclose(metrics["margin"].value, np.mean(margins), rtol=1e-4, atol=1e-5)
    assert metrics["accuracy"].value == np.mean(np.array(margins) > 0)


def test_kto_compares_each_answer_with_the_mean_of_mismatched_ones(models):
    """Of every pair the first answer is the one that is liked, or not, and the second the mismatched one."""
    model, params, reference = models
    batch = batch_of(documents(), M=2)
    batch["score_BT"] = np.where(batch["segments_BT"] % 4 == 1, 1.0, 0.0).astype(np.float32)
    given, ((loss, metrics), _) = differentiated(model, config(**GRADIENTS["kto"]))(params, batch, reference)
    ratios = [[logp - ref_logp for logp, ref_logp, _ in pair] for pair in alone(models)]
    kl = np.mean([each[1] for each in ratios if len(each) > 1])
    np.testing.assert_allclose(given["kl"], [kl, kl], rtol=1e-4)
    liked, z = [True, False, True, True, False], max(kl, 0.0)
    values = [1.5 * (1 - expit(0.3 * (each[0] - z))) if like else 0.5 * (1 - expit(0.3 * (z - each[0])))
              for each, like in zip(ratios, liked, strict=True)]  # fmt: skip
    nlls = [-pair[0][0] / pair[0][2] if like else 0.0 for pair, like in zip(alone(models), liked, strict=True)]
    np.testing.assert_allclose(loss, np.mean(values) + 0.2 * np.mean(nlls), rtol=1e-5)
    disliked = np.mean([ratios[1][0], ratios[4][0]])
    np.testing.assert_allclose(metrics["rejected_log_ratio"].value, disliked, rtol=1e-4)
    assert metrics["chosen_log_ratio"].count == 3


@pytest.mark.parametrize("stored", [False, True])
def test_a_policy_that_is_its_reference_has_loss_log_2_and_margin_0(models, stored):
    """C8, with dropout in the config; a stored reference is not asked again."""
    model, params, reference = models
    batch, asked = batch_of(documents(), M=2), params
    if stored:
        say = preferences.ask_reference(model)
        batch |= jax.tree.map(
            lambda *x: np.stack(x), *(say(params, {k: x[m] for k, x in batch.items()}) for m in (0, 1))
        )
        asked = jax.tree.map(lambda x: x * np.nan, params)
    _, ((loss, metrics), _) = differentiated(model, config())(params, batch, asked)
    np.testing.assert_allclose(loss, np.log(2), atol=1e-6)
    np.testing.assert_allclose(metrics["margin"].value, 0.0, atol=1e-6)


def test_swapped_answers_have_the_opposite_margin(models):
    model, params, reference = models
    rows = [[pair if len(pair) == 2 else pair * 2 for pair in row] for row in documents()]
    batches = (batch_of(rows, M=2, swapped=swapped) for swapped in (False, True))
    margins = [differentiated(model, config())(params, batch, reference)[1][0][1]["margin"] for batch in batches]
    np.testing.assert_allclose(margins[0].value, -margins[1].value, atol=1e-5)
    assert abs(margins[0].value) > 0.01


@pytest.mark.parametrize("name", GRADIENTS)
def test_the_reference_gets_no_gradient(models, name):
    model, params, reference = models
    prepare, objective = referred(model, model, config(**GRADIENTS[name])), preference(model, config(**GRADIENTS[name]))

    def loss(ref_params):
        return objective(params, first(prepare(params, batch_of(documents()), ref_params=ref_params)))[0]

    assert not any(np.any(x) for x in jax.tree.leaves(jax.jit(jax.grad(loss))(reference)))


def test_micro_batches_make_the_same_loss_whatever_it_is(models):
    """C1. One row of four has no pair and one an answer alone, so that a mean of means would differ."""
    model, params, reference = models
    whole, parts = (measured(model)(params, batch_of(documents(), M), reference) for M in (1, 4))
    for key, (_, (loss, metrics)) in whole.items():
        np.testing.assert_allclose(loss, parts[key][1][0], rtol=1e-6, err_msg=str(key))
        assert metrics["accuracy"].value == parts[key][1][1]["accuracy"].value


@pytest.mark.parametrize("name", GRADIENTS)
def test_micro_batches_make_the_same_gradient(models, name):
    model, params, reference = models
    run = differentiated(model, config(**GRADIENTS[name]))
    whole, parts = (run(params, batch_of(documents(), M), reference)[1][1] for M in (2, 4))
    largest = max(np.max(np.abs(x)) for x in jax.tree.leaves(whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), whole, parts)


def test_what_is_masked_or_padding_changes_no_loss(models):
    """C2: other targets where nothing is learned, other tokens in the padding, and 37 further pads."""
    model, params, reference = models
    batch, run = batch_of(documents()), measured(model)
    other = {key: x.copy() for key, x in batch.items()}
    other["targets_BT"][~batch["mask_BT"]] = 39
    other["tokens_BT"][batch["segments_BT"] == 0] = 17
    padded = {key: np.pad(x, ((0, 0), (0, 0), (0, 37))) for key, x in batch.items()}
    found, same, longer = (run(params, each, reference) for each in (batch, other, padded))
    for key, (_, (loss, _)) in found.items():
        assert loss == same[key][1][0]
        np.testing.assert_allclose(loss, longer[key][1][0], rtol=1e-5, err_msg=str(key))


@pytest.mark.parametrize("name", GRADIENTS)
def test_what_is_masked_reaches_no_gradient(models, name):
    model, params, reference = models
    run, batch = differentiated(model, config(**GRADIENTS[name])), batch_of(documents(), M=2)
    given, (_, gradient) = run(params, batch, reference)
    other = {key: x.copy() for key, x in batch.items()}
    other["targets_BT"][~batch["mask_BT"]] = 39
    jax.tree.map(np.testing.assert_array_equal, gradient, run(params, other, reference)[1][1])
    stored = batch | {"ref_logp_BT": jnp.where(batch["mask_BT"], given["ref_logp_BT"], np.nan)}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, run(params, stored, reference)[1][1]
    )


def test_a_batch_without_a_pair_has_loss_and_gradient_zero(models):
    model, params, reference = models
    for name in GRADIENTS:
        _, ((loss, metrics), gradient) = differentiated(model, config(**GRADIENTS[name]))(
            params, batch_of([[], []], M=2), reference
        )
        assert loss == 0 and metrics["accuracy"].count == 0 and not any(np.any(x) for x in jax.tree.leaves(gradient))


def test_a_mesh_changes_no_loss(models, make_mesh):
    model, params, reference = models
    of, batch = config(loss="kto", sft_weight=0.3), batch_of(documents())
    run, rewarding = summed(model, of, lambda objective: objective), reward(model, RewardConfig(1.0, 0.0, 0.0, 0.0))
    head = {"scalar_head": {"kernel": np.full(16, 0.1, np.float32), "bias": np.float32(0)}}

    def both(params, batch, reference):
        scored = preferences.weighed_scores(params, batch)
        return run(params, batch, reference)[1][0], rewarding(params | head, first(scored))[0]

    expected, mesh = jax.jit(both)(params, batch, reference), make_mesh(2, 2, 2)
    where = sharding.parameter_shardings(parameter_rules(model.config), params, mesh)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(each, where) for each in (params, reference)]
        found = jax.jit(both)(placed[0], sharding.global_batch(batch, mesh), placed[1])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# ---- reward models ----

REWARD = RewardConfig(pair_weight=0.7, score_weight=0.2, centering=0.05, margin=2.0)


@pytest.fixture(scope="module")
def judge(tiny, built):
    model, params = built(tiny(scalar_head=True, num_layers=1))
    return model, jax.tree.map(jnp.asarray, params)


def rewards(model, params, rows):
    """row -> pair -> [reward, ...]: the scalar head at the last input of each document alone."""
    head = params["scalar_head"]

    @jax.jit
    def hidden(ids_BT):
        return model.hidden(params, ids_BT)

    def one(ids, n):
        padded = np.pad(ids[None], ((0, 0), (0, T - len(ids))))
        return np.float64(hidden(padded)[0, len(ids) - 2]) @ np.float64(head["kernel"]) + head["bias"], n

    return [[one(*answer) for answer in pair] for row in rows for pair in row]


@functools.cache
def rewarded(model, of):
    """(params, batch) -> ((loss, metrics), gradients), summed over micro-batches."""
    run = jax.value_and_grad(reward(model, of), has_aux=True)

    @jax.jit
    def every(params, batch):
        given = preferences.weighed_scores(params, batch)
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.lax.map(lambda part: run(params, part), given))

    return every


def test_a_reward_is_read_at_the_last_input_and_learned_from_pairs_and_scores(judge):
    model, params = judge
    rows, of = documents(), REWARD
    (loss, metrics), _ = rewarded(model, of)(params, batch_of(rows))
    found = rewards(model, params, rows)
    number = [0, 1, 0, 0, 1]  # of the pair in its row, which decides its margin
    pairs = [(c, r, 2.0 * 0.1 * (n + 1)) for each, n in zip(found, number, strict=True) if len(each) == 2
             for (c, _), (r, _) in [each]]  # fmt: skip
    ranked = np.mean([-log(expit(c - r - m)) + 0.05 * (c + r) ** 2 for c, r, m in pairs])
    errors = [(value - n) ** 2 for each in found for value, n in each if n != 2]
    np.testing.assert_allclose(loss, 0.7 * ranked + 0.2 * np.mean(errors), rtol=1e-5)
    assert len(errors) == 7 == metrics["score_error"].count and metrics["reward"].count == 9
    values = [value for each in found for value, _ in each]
    np.testing.assert_allclose(metrics["reward"].value, np.mean(values), rtol=1e-4)
    np.testing.assert_allclose(metrics["reward_square"].value, np.mean(np.square(values)), rtol=1e-4)
    longer = [each[0][0] > each[1][0] for each in found if len(each) == 2 and each[0][1] > each[1][1]]
    shorter = [each[0][0] > each[1][0] for each in found if len(each) == 2 and each[0][1] < each[1][1]]
    assert metrics["accuracy_chosen_longer"].value == np.mean(longer) and len(longer) == 2
    assert metrics["accuracy_chosen_shorter"].value == np.mean(shorter) and len(shorter) == 1


def test_neither_later_tokens_nor_padding_nor_micro_batches_change_a_reward(judge):
    """C1, C2, C10."""
    model, params = judge
    of, batch = REWARD, batch_of(documents())
    (loss, _), gradient = rewarded(model, of)(params, batch)
    other = {key: x.copy() for key, x in batch.items()}
    other["tokens_BT"][batch["segments_BT"] == 0] = 17
    other["targets_BT"][:] = 5
    other["score_BT"][batch["segments_BT"] == 0] = 1e4
    (changed, _), changed_gradient = rewarded(model, of)(params, other)
    assert loss == changed
    jax.tree.map(np.testing.assert_array_equal, gradient, changed_gradient)
    padded = {key: np.pad(x, ((0, 0), (0, 0), (0, 37))) for key, x in batch.items()}
    np.testing.assert_allclose(rewarded(model, of)(params, padded)[0][0], loss, rtol=1e-6)
    (parts, _), parts_gradient = rewarded(model, of)(params, batch_of(documents(), M=4))
    np.testing.assert_allclose(parts, loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, parts_gradient)


def test_planted_preferences_are_learned_by_a_reward_model_and_by_dpo(tiny):
    """C10, C23: token 7 in an answer decides, of held-out pairs more than 95 %."""
    model = build(tiny(scalar_head=True, num_layers=1, width=32))
    draw = np.random.default_rng(5)

    def pairs(count):
        found = []
        for _ in range(count):
            prompt, lengths = draw.integers(8, 40, PROMPT), draw.integers(2, 5, 2)
            answers = [np.concatenate([prompt, draw.integers(8, 40, n + 1)]) for n in lengths]
            answers[0][PROMPT + draw.integers(lengths[0])] = 7
            found.append([[(ids, n) for ids, n in zip(answers, lengths, strict=True)]])
        return found

    train, held_out = batch_of(pairs(512)), batch_of(pairs(256))
    params, chain = model.init(jax.random.key(0)), optax.adam(3e-3)
    learners = (
        (preferences.weighed_scores, reward(model, RewardConfig(1.0, 0.0, 0.0, 0.0))),
        (functools.partial(referred(model, model, config()), ref_params=params), preference(model, config())),
    )
    for prepare, objective in learners:
        given, asked = prepare(params, train), first(prepare(params, held_out))
        step = jax.jit(functools.partial(update, loss=objective, optimizer=optax.with_extra_args_support(chain)))
        state = init_state(params, chain)
        for _ in range(40):
            state, _ = step(state, given)
        accuracy = jax.jit(objective)(state.params, asked)[1]["accuracy"].value
        assert accuracy > 0.95


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(loss="dpp"), r"preference\.loss='dpp' is no loss; did you mean 'dpo'"),
        (dict(beta=0.0), r"preference\.beta=0\.0 must be positive"),
        (dict(label_smoothing=0.5), r"label_smoothing=0\.5 must be in \[0, 0\.5\)"),
        (dict(beta=float("nan")), r"preference\.beta=nan must be positive"),
        (dict(gamma=float("nan")), r"preference\.gamma=nan must not be negative"),
        (dict(gamma=-1.0), r"preference\.gamma=-1\.0 must not be negative"),
        (dict(loss="orpo"), "'orpo' with sft_weight=0 pushes answers apart"),
        (
            dict(loss="simpo", store_reference=True),
            "store_reference=True stores nothing: loss='simpo' has no reference",
        ),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)
    assert dataclasses.is_dataclass(config())


def test_a_reward_config_that_learns_nothing_is_refused():
    with pytest.raises(ValueError, match="are both 0: nothing is learned"):
        RewardConfig(0.0, 0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"reward\.centering=-1\.0 must not be negative"):
        RewardConfig(1.0, 0.0, -1.0, 0.0)
    with pytest.raises(ValueError, match=r"reward\.margin=nan must not be negative"):
        RewardConfig(1.0, 0.0, 0.0, float("nan"))
