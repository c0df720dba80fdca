import json

import jax
import numpy as np
import pytest

from configs import common
from jaxllm import checkpoint, workdir
from jaxllm.evaluate import rewarding
from jaxllm.text import chat
from jaxllm.text.chat import Conversation
from jaxllm.text.special_tokens import END_ID
from jaxllm.text.tokenizer import byte_tokenizer

SIZES = dict(num_layers=1, width=16, mlp_width=16, num_heads=4, num_kv_heads=2, head_width=8, operand_dtype="float32")
PAIRS = [  # chosen is longer, shorter, equally long
    {"prompt": "a", "chosen": "long answer", "rejected": "no"},
    {"prompt": "b", "chosen": "yes", "rejected": "a long answer"},
    {"prompt": "c", "chosen": "yes", "rejected": "nos"},
    {"prompt": "d", "chosen": "longest answer", "rejected": "short"},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function: name, validation metrics, whether the model has a scalar head -> a saved run's directory."""
    place = tmp_path_factory.mktemp("runs")

    def run(name, metrics, scalar_head=True, seed=0):
        config = common.get_config()
        config.model, config.tokenizer.kind = common.llama(**SIZES, scalar_head=scalar_head), "bytes"
        directory = workdir.open(place / name, config.to_dict())
        byte_tokenizer().save(directory / "tokenizer")
        model = workdir.saved(directory).model
        draw = np.random.default_rng(seed)
        params = jax.tree.map(
            lambda x: jax.numpy.float32(x + draw.normal(0, 0.2, x.shape)), model.init(jax.random.key(seed))
        )
        with checkpoint.open(directory / "checkpoints") as checkpoints:
            checkpoints.save(1, {"params": params}, position={}, meta={}, metrics=metrics)
        return directory

    return run


@pytest.fixture(scope="module")
def members(run):
    measured = {"validation_reward": 0.5, "validation_reward_square": 4.25}  # a deviation of 2
    return [run("one", measured), run("other", {"validation_reward": 0.0, "validation_reward_square": 1.0}, seed=1)]


def alone(directory, ids):
    """The scalar of the last token of one unpadded sequence."""
    model, params, _ = workdir.load(directory)
    hidden_BTD = model.hidden(params, np.array([ids]))
    return float(model.scalars(params, hidden_BTD)[0, -1])


def test_a_score_is_read_at_the_end_of_the_answer_on_the_scale_of_the_checkpoint(members):
    """C10: of each answer alone, whatever its neighbours."""
    prompts = [Conversation(({"role": "user", "content": text},)) for text in ("Hi", "Why is it so?", "é", "Hi")]
    answers = ["there", "because", "", "a much longer answer than the others"]
    found = rewarding.load(members[:1])(prompts, answers)
    for prompt, answer, mean in zip(prompts, answers, found.mean, strict=True):
        ids = [*chat.prompt(prompt, byte_tokenizer()), *byte_tokenizer().encode(answer), END_ID]
        assert mean == pytest.approx((alone(members[0], ids) - 0.5) / 2, abs=1e-5)
    assert np.all(found.spread == 0)


def test_an_ensemble_has_the_mean_of_its_members_and_their_spread(members):
    prompts, answers = [Conversation(({"role": "user", "content": "Hi"},))] * 2, ["there", "you"]
    one, other, both = (rewarding.load(some)(prompts, answers) for some in (members[:1], members[1:], members))
    np.testing.assert_allclose(both.mean, (one.mean + other.mean) / 2, rtol=1e-6)
    np.testing.assert_allclose(both.spread, np.abs(one.mean - other.mean) / 2, rtol=1e-6)


def test_reward_models_lie_on_the_mesh_that_is_set_and_say_the_same(members, make_mesh):
    prompts, answers = [Conversation(({"role": "user", "content": "Hi"},))] * 3, ["there", "you", "é, and more"]
    alone = rewarding.load(members)(prompts, answers)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        found = rewarding.load(members)(prompts, answers)
    np.testing.assert_allclose(found, alone, atol=1e-5)


def test_accuracy_stands_beside_what_length_alone_would_say(members, tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(PAIRS))
    report, bins = rewarding.accuracy(members, path=str(path))
    margins = []
    for pair in PAIRS:
        ids = {
            side: [*chat.prompt(Conversation(({"role": "user", "content": pair["prompt"]},)), byte_tokenizer()),
                   *byte_tokenizer().encode(pair[side]), END_ID]
            for side in ("chosen", "rejected")
        }  # fmt: skip
        each = [alone(member, ids["chosen"]) - alone(member, ids["rejected"]) for member in members]
        margins.append(np.mean(each))
    right = np.array(margins) > 0
    assert report["pairs"] == 4 and report["accuracy"]["value"] == np.mean(right)
    assert report["chosen_longer"]["value"] == np.mean(right[[0, 3]])
    assert report["chosen_shorter"]["value"] == float(right[1])
    assert report["longer_wins"]["value"] == (2 + 0.5) / 4 and report["random"] == 0.5
    assert report["accuracy"]["low"] < report["accuracy"]["value"] < report["accuracy"]["high"] or right.all()
    assert sum(each.count for each in bins) == 4 and report["spread"] > 0


def test_what_is_no_reward_model_or_has_no_scale_is_refused(run):
    with pytest.raises(ValueError, match="is no reward model: its network has no scalar head"):
        rewarding.load([run("policy", {}, scalar_head=False)])
    with pytest.raises(ValueError, match="saved without a validation, so the scale of its rewards is unknown"):
        rewarding.load([run("early", {})])
    with pytest.raises(ValueError, match="no reward model is named"):
        rewarding.load([])
