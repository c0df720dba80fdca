import jax
import pytest

from jaxllm import workdir
from jaxllm.evaluate.continuations import continuations
from jaxllm.generate import SamplerConfig


@pytest.fixture
def generate(script, untrained_run):
    """A function: flags -> what the script printed."""

    def generate(*flags):
        status, printed, said = script("generate.py", f"--workdir={untrained_run}", "--max_new_tokens=12", *flags)
        assert status == 0, (status, said)
        return printed

    return generate


def test_greedy_text_is_the_prompt_and_what_the_model_continues_it_with(generate, untrained_run):
    model, params, tokenizer = workdir.load(untrained_run)
    greedy = dict(max_new_tokens=12, sampler=SamplerConfig(temperature=0.0))
    (text,) = continuations(model, params, tokenizer, ["é start"], jax.random.key(0), **greedy)
    assert generate("--prompt=é start", "--temperature=0") == f"é start{text}\n"


def test_the_same_seed_gives_the_same_texts_and_each_sample_and_seed_another(generate):
    two = generate("--prompt=a", "--num_samples=2")
    assert generate("--prompt=a", "--num_samples=2") == two != generate("--prompt=a", "--num_samples=2", "--seed=1")
    first = generate("--prompt=a")
    assert two.startswith(first) and two != 2 * first


def test_the_step_decides_which_parameters_speak(generate):
    assert (
        generate("--temperature=0")
        == generate("--temperature=0", "--step=2")
        != generate("--temperature=0", "--step=1")
    )


def test_the_sampler_is_shown_beside_the_text(script, untrained_run):
    flags = ("--top_k=5", "--top_p=0.9", "--min_p=0.1", "--temperature=0.7", "--max_new_tokens=3", "--seed=4")
    status, _, said = script("generate.py", f"--workdir={untrained_run}", *flags)
    parts = ("temperature=0.7", "top_k=5", "top_p=0.9", "min_p=0.1", "max_new_tokens=3", "seed=4")
    assert status == 0 and all(part in said for part in parts)


def test_likelier_tokens_only_means_greedy_at_the_limit(generate):
    greedy = generate("--prompt=abc", "--temperature=0")
    for flag in ("--top_k=1", "--top_p=0.000001", "--min_p=1"):
        assert generate("--prompt=abc", flag) == greedy


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature=-1"], "ValueError: temperature=-1.0 must be at least 1e-06"),
        (["--top_p=0"], "ValueError: top_p=0.0 must be in (0, 1]"),
        (["--max_new_tokens=0"], "max_new_tokens=0"),
        (["--step=9"], "no checkpoint of step 9"),
    ],
)
def test_what_cannot_be_sampled_is_named_in_one_message(script, untrained_run, flags, message):
    status, *_ = script("generate.py", f"--workdir={untrained_run}", *flags)
    assert message in status


def test_a_directory_without_a_run_is_named(script, tmp_path):
    status, *_ = script("generate.py", f"--workdir={tmp_path}")
    assert status.startswith("FileNotFoundError: no run in ") and "name a directory that train.py made" in status


def test_the_help_names_every_flag(script):
    status, printed, _ = script("generate.py", "--help")
    flags = (
        "--workdir",
        "--prompt",
        "--temperature",
        "--top_k",
        "--top_p",
        "--min_p",
        "--max_new_tokens",
        "--seed",
        "--step",
    )
    assert status == 0 and all(flag in printed for flag in flags)
