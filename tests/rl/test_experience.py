import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.data.problems import ProblemSource
from jaxllm.rewards.scoring import Term
from jaxllm.rl import experience as experiences
from jaxllm.rl.config import RolloutConfig
from jaxllm.rl.experience import experience
from jaxllm.rl.layout import Shape
from jaxllm.rl.report import explained_variance, warnings
from jaxllm.rl.rewarding import Verdict
from jaxllm.text.tokenizer import byte_tokenizer
from jaxllm.train.policy import PolicyConfig, policy

ROLLOUT = dict(
    sources={"bandit": ProblemSource("bandit", level=3)}, rewards={"odd": Term("bandit")}, completions=4,
    max_prompt_tokens=24, max_new_tokens=6, temperature=0.8, validation_temperature=0.0, slots=3, refill_rounds=0,
    tools=(), turns=1, workers=0, time_limit=5.0, shown=1,
)  # fmt: skip
POLICY = dict(
    advantage="group", ratio="token", surrogate="clip", weights="token", clip_low=0.2, clip_high=0.2,
    importance_cap=2.0, kl="k3", kl_loss=0.1, kl_reward=0.0, kl_target=0.0, kl_horizon=100, entropy=0.0, whiten=False,
    gamma=1.0, lam=0.95, value_weight=0.5, value_clip=0.2, epochs=2, minibatches=2,
)  # fmt: skip
SHAPE = Shape(micro_batches=2, rows=2, length=48)


@pytest.fixture(scope="module")
def policy_of(tiny, built):
    """(model, params) over bytes, its words less even than at the start."""
    model, params = built(tiny(vocab_size=byte_tokenizer().vocab_size, num_layers=1))
    return model, jax.tree.map(lambda x: 2 * jnp.asarray(x), params)


def made(model, rollout=None, **changes):
    how = dict(shape=SHAPE, place=lambda batch: batch, held_out=0.1, seed=0)
    rollout = RolloutConfig(**(ROLLOUT | (rollout or {})))
    return experience(rollout, PolicyConfig(**(POLICY | changes)), model, model, byte_tokenizer(), **how)


@pytest.fixture(scope="module")
def drawn(policy_of):
    """Experience after its first of four updates, the batches of all four, and what was told."""
    model, params = policy_of
    found = made(model)
    batches = [found.batch(params, None, step, ref_params=params) for step in range(4)]
    return found, [batch for batch, _ in batches], batches[0][1]


def rows_of(batch):
    """Every completion of a batch, as (prompt's ids, completion's ids, its columns), read from the rows."""
    flat = {name: x.reshape(-1, x.shape[-1]) for name, x in batch.items()}
    for row in range(len(flat["tokens_BT"])):
        segments_T, mask_T = flat["segments_BT"][row], flat["mask_BT"][row]
        for segment in np.unique(segments_T[mask_T]):
            here = segments_T == segment
            parent = flat["parents_BT"][row][here][0]
            prompt = [*flat["tokens_BT"][row][(segments_T == parent) & ~here], flat["tokens_BT"][row][here][0]]
            yield (
                tuple(map(int, prompt)),
                tuple(map(int, flat["targets_BT"][row][here])),
                {name: flat[name][row][here] for name in flat},
            )


def test_each_epoch_learns_from_every_completion_once_in_another_order(drawn):
    _, batches, _ = drawn
    epochs = [[row[:2] for batch in batches[start : start + 2] for row in rows_of(batch)] for start in (0, 2)]
    assert len(epochs[0]) == len(epochs[1]) == 8 and sorted(epochs[0]) == sorted(epochs[1])
    assert [set(row[:2] for row in rows_of(batch)) for batch in batches[:2]] != [
        set(row[:2] for row in rows_of(batch)) for batch in batches[2:]
    ]


def test_the_columns_of_a_completion_stay_with_it(drawn):
    """Advantages, log-probabilities and weights are found again at the tokens that they are of (C17)."""
    found, batches, _ = drawn
    columns = {}
    for batch in batches:
        for prompt, tokens, own in rows_of(batch):
            kept = {name: own[name] for name in ("sampled_logp_BT", "old_logp_BT", "ref_logp_BT", "advantage_BT")}
            before = columns.setdefault((prompt, tokens, kept["sampled_logp_BT"].tobytes()), kept)
            for name in kept:
                np.testing.assert_array_equal(kept[name], before[name])
            assert len(set(own["advantage_BT"].tolist())) == 1
    for batch in batches:
        assert batch["weight_BT"].sum() == pytest.approx(1.0, abs=1e-6)


def test_the_first_update_has_a_ratio_of_1_whatever_the_temperature(policy_of, drawn):
    model, params = policy_of
    found, batches, _ = drawn
    batch = {name: jnp.asarray(x.reshape(-1, x.shape[-1])) for name, x in batches[0].items()}
    objective = jax.jit(policy(model, found.policy, temperature=ROLLOUT["temperature"]))
    loss, told = objective(params, batch)
    value = {name: float(ratio.value) for name, ratio in told.items()}
    assert abs(value["ratio"] - 1) < 1e-5 and value["clipped_high"] == value["clipped_low"] == 0
    assert value["rollout_train_logp_diff"] < 1e-4 and value["kl_per_token"] < 1e-6 and math.isfinite(loss)
    other = jax.jit(policy(model, found.policy, temperature=1.0))(params, batch)[1]
    assert abs(float(other["ratio"].value) - 1) > 1e-3


def test_what_is_told_is_what_was_sampled(drawn):
    found, batches, told = drawn
    lengths = [len(tokens) for batch in batches[:2] for _, tokens, _ in rows_of(batch)]
    assert told["completion_tokens"] == pytest.approx(np.mean(lengths))
    assert told["completion_tokens_max"] == max(lengths) <= ROLLOUT["max_new_tokens"]
    assert abs(told["kl"]) < 1e-3 and told["reward/odd"] == told["reward"] and told["reward_failures"] == 0
    table = found.rows()
    assert len(table) == ROLLOUT["completions"] and table[0].keys() >= {"prompt", "text", "reward", "odd"}


def test_a_rollout_goes_on_in_another_process_where_it_was(policy_of, drawn):
    model, params = policy_of
    _, batches, told = drawn
    before = made(model)
    before.batch(params, None, 0, ref_params=params)
    state = json.loads(json.dumps(before.get_state()))
    after = made(model)
    after.set_state(state)
    again = [after.batch(None, None, step, ref_params=None) for step in (1, 2, 3)]
    for (batch, also_told), wanted in zip(again, batches[1:], strict=True):
        assert batch.keys() == wanted.keys() and also_told.keys() == told.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], wanted[name])
    assert after.get_state()["drawn"] is None and after.position == before.position


class Graded:
    """Rewards that a test decides: of completion n of problem p of each asking in turn."""

    waited = 0.0

    def __init__(self, askings):
        self.askings, self.asked = iter(askings), []

    def begin(self):
        self.rewards = next(self.askings)

    def submit(self, number, problem, answer, max_new_tokens):
        self.asked.append(number)

    def verdicts(self, problems, answers):
        flat = np.array(self.rewards, float)[: len(problems)].reshape(-1)
        return [Verdict(reward, {"given": reward}, "timeout" * bool(np.isnan(reward))) for reward in flat]

    def close(self):
        pass


def test_groups_that_teach_nothing_are_drawn_again_until_the_rounds_are_over(policy_of):
    model, params = policy_of
    even, uneven = [1.0] * 4, [0.0, 1.0, 1.0, 1.0]
    found = made(model, rollout=dict(refill_rounds=2), minibatches=1, epochs=1, kl_loss=0.0)
    found.rewarding = Graded([[even], [even], [uneven]])
    _, told = found.batch(params, None, 0, ref_params=params)
    assert told["drawn_again"] == 2 and told["undecided"] == 0 and found.position == 3
    found.rewarding = Graded([[uneven]])
    _, told = found.batch(params, None, 1, ref_params=params)
    assert told["drawn_again"] == 0 and found.position == 4
    found.rewarding = Graded([[even], [even], [even]])
    _, told = found.batch(params, None, 2, ref_params=params)
    assert told["drawn_again"] == 2 and told["undecided"] == 1 and found.position == 7


def test_a_completion_without_a_reward_is_left_out_and_counted(policy_of):
    model, params = policy_of
    found = made(model, minibatches=1, epochs=1, kl_loss=0.0)
    found.rewarding = Graded([[[0.0, math.nan, 1.0, 1.0]]])
    batch, told = found.batch(params, None, 0, ref_params=params)
    assert len(list(rows_of(batch))) == 3 and told["reward"] == pytest.approx(2 / 3)
    assert batch["weight_BT"].sum() == pytest.approx(1.0, abs=1e-6)
    advantages = [own["advantage_BT"][0] for _, _, own in rows_of(batch)]
    np.testing.assert_allclose(sorted(advantages), np.array([-2, 1, 1]) / 3 / np.std([0, 1, 1], ddof=1), rtol=1e-5)


def test_a_critic_is_told_of_nothing_where_every_reward_failed(tiny, built):
    model, params = built(tiny(vocab_size=byte_tokenizer().vocab_size, num_layers=1, scalar_head=True))
    found = made(model, minibatches=1, epochs=1, kl_loss=0.0, advantage="gae")
    found.rewarding = Graded([[[math.nan] * 4]])
    batch, told = found.batch(params, None, 0, ref_params=params)
    assert math.isnan(told["value"]) and math.isnan(told["explained_variance"]) and not batch["weight_BT"].any()


def test_prompts_that_are_too_long_are_not_asked_and_counted(policy_of):
    model, params = policy_of
    found = made(model, rollout=dict(max_prompt_tokens=4))
    with pytest.raises(
        ValueError, match="have prompts of at most 4 tokens, and 2 are needed: raise rollout.max_prompt"
    ):
        found.batch(params, None, 0, ref_params=params)
    assert found.too_long == 200


def test_held_out_prompts_that_are_too_long_are_not_asked_and_counted(policy_of, tmp_path):
    _, params = policy_of
    records = [{"prompt": f"{n} " + "x" * 80 * (n % 2), "answer": "1"} for n in range(40)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sources = {"asked": ProblemSource("file", path=str(tmp_path / "asked.jsonl"))}
    found = made(policy_of[0], rollout=dict(sources=sources))
    found.rewarding = Graded([[[1.0], [0.0], [1.0], [0.0]]])
    problems = [found.problems.problem(n) for n in range(8)]
    long = [problem for problem in problems if "x" in problem.prompt.messages[-1]["content"]]
    told = found.probe(params, problems)
    assert 0 < told["too_long"] == len(long) < 8
    assert len(found.rewarding.asked) == 8 - len(long)
    with pytest.raises(ValueError, match="no held-out problem of .* of at most 24 tokens: raise rollout.max_prompt"):
        found.probe(params, long)


@pytest.mark.parametrize(
    "rollout, changes, message",
    [
        (dict(sources={}), {}, "rollout.sources is empty"),
        (dict(rewards={}), {}, "rollout.rewards is empty"),
        (dict(completions=3), {}, "loop.batch_size=4 times policy.minibatches=2 is not a multiple of rollout.compl"),
        (dict(completions=1), {}, "policy.advantage='group' compares the completions of a prompt, and .*=1: set 2"),
        (dict(max_new_tokens=40), {}, "max_new_tokens=40 make 63 pairs of tokens, a row has data.sequence_length=48"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(policy_of, rollout, changes, message):
    with pytest.raises(ValueError, match=message):
        made(policy_of[0], rollout=rollout, **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(completions=0), "rollout.completions=0 must be at least 1"),
        (dict(temperature=0.0), "rollout.temperature=0.0 must be positive"),
        (dict(temperature=1e-38), "temperature=1e-38 must be at least 1e-06"),
        (dict(tools=("calculater",), turns=2), "rollout.tools has 'calculater', .* did you mean 'calculator'"),
        (dict(tools=("calculator",)), "rollout.turns=1 leaves no turn after a tool's: set 2 or more"),
        (dict(sources={"a": {"kind": "adition"}}), "config.rollout.sources.a"),
    ],
)
def test_a_rollout_that_cannot_be_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        RolloutConfig(**(ROLLOUT | changes))


def test_as_many_slots_are_there_however_much_is_asked(policy_of, monkeypatch):
    """Another number of them would be another program: groups that are drawn again are ever fewer."""
    model, params = policy_of
    found, seen, asked = made(model, rollout=dict(slots=0)), [], experiences.sampled
    monkeypatch.setattr(experiences, "sampled", lambda *a, **how: seen.append(how["slots"]) or asked(*a, **how))
    found.batch(params, None, 0, ref_params=params)
    found.probe(params, found.problems.validation(1))
    assert seen == [8, 8]


def test_why_a_reward_failed_is_said_once(policy_of, capsys):
    model, params = policy_of
    found = made(model, minibatches=1, epochs=1, kl_loss=0.0)
    found.rewarding = Graded([[[0.0, math.nan, math.nan, 1.0]]] * 2)
    for step in (0, 1):
        found.batch(params, None, step, ref_params=params)
    assert capsys.readouterr().err.count("warning: a reward failed: timeout") == 1


def test_a_critic_explains_all_none_or_less_than_a_constant():
    returns = np.array([0.0, 1.0, 3.0])
    assert explained_variance(returns, returns - 2) == 1 and explained_variance(returns, np.ones(3)) == 0
    assert explained_variance(returns, -returns) == pytest.approx(-3)
    assert math.isnan(explained_variance(np.ones(3), returns))
    assert math.isnan(explained_variance(np.ones(0), np.ones(0)))


def test_what_is_likely_wrong_is_said():
    fine = {"clipped_fraction": 0.1, "undecided": 0.2, "kl": 0.0}
    assert warnings(fine) == []
    assert (
        len(warnings(fine | {"clipped_fraction": 0.6})) == 1 and len(warnings(fine | {"clipped_fraction": 0.96})) == 2
    )
    assert "nothing is learned" in warnings(fine | {"undecided": 0.95})[0]
    assert not warnings({"clipped_fraction": 0.1})  # of an advantage that compares no group
    assert "below 0" in warnings(fine | {"kl": -0.1})[0]
