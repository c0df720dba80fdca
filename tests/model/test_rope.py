import cmath
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.model import RopeConfig
from jaxllm.model.rope import rotate, table, wavelengths

H = 16
PLAIN = dict(
    theta=500000.0,
    local_theta=0.0,
    scaling="none",
    factor=8.0,
    original_length=8192,
    low_frequency=1.0,
    high_frequency=4.0,
)
SCALINGS = {
    "none": {},
    "linear": {},
    "llama3": {},
    "yarn": dict(theta=10000.0, original_length=4096, factor=4.0, low_frequency=1.0, high_frequency=32.0),
}


def config(scaling="none", **changes):
    return RopeConfig(**(PLAIN | SCALINGS[scaling] | {"scaling": scaling} | changes))


def frequencies(scaling):
    """(radians per position of each pair, factor on the table) in Python floats, case by case as in the papers."""
    rope = config(scaling)
    plain = [1 / rope.theta ** (2 * pair / H) for pair in range(H // 2)]
    if scaling == "none":
        return plain, 1.0
    if scaling == "linear":
        return [frequency / rope.factor for frequency in plain], 1.0
    if scaling == "llama3":
        return [llama3(rope, frequency) for frequency in plain], 1.0
    turn = lambda beta: H * math.log(rope.original_length / (beta * 2 * math.pi)) / (2 * math.log(rope.theta))  # noqa: E731
    low, high = max(math.floor(turn(32)), 0), min(math.ceil(turn(1)), H - 1)
    ramp = [min(max((pair - low) / (high - low), 0), 1) for pair in range(H // 2)]
    mixed = [ramp[pair] * plain[pair] / rope.factor + (1 - ramp[pair]) * plain[pair] for pair in range(H // 2)]
    return mixed, 0.1 * math.log(rope.factor) + 1


def llama3(rope, frequency):
    wavelength = 2 * math.pi / frequency
    if wavelength < rope.original_length / rope.high_frequency:
        return frequency
    if wavelength > rope.original_length / rope.low_frequency:
        return frequency / rope.factor
    smooth = (rope.original_length / wavelength - rope.low_frequency) / (rope.high_frequency - rope.low_frequency)
    return (1 - smooth) * frequency / rope.factor + smooth * frequency


@pytest.mark.parametrize("scaling", SCALINGS)
def test_tables_match_float64_at_every_position_and_at_the_last(scaling):
    positions = np.append(np.arange(4096), [2**20 - 1, 2**20 - 1025, 123_457])
    inverse, factor = frequencies(scaling)
    angles = np.outer(positions, inverse)
    found = table(config(scaling), H, jnp.asarray(positions)[None, :], "global")
    assert found.dtype == jnp.float32 and found.shape == (2, 1, len(positions), H // 2)
    np.testing.assert_allclose(found[0, 0], factor * np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(found[1, 0], factor * np.sin(angles), atol=1e-6)


@pytest.mark.parametrize("scaling", ["llama3", "yarn"])
def test_stretching_keeps_the_fast_pairs_and_divides_the_slow_ones(scaling):
    plain, stretched = (
        wavelengths(config(), H, local=False)[0],
        wavelengths(config(scaling, theta=PLAIN["theta"]), H, local=False)[0],
    )
    ratio = plain / stretched
    assert ratio[0] == 1 and math.isclose(ratio[-1], config(scaling).factor)
    assert np.any((ratio > 1.01) & (ratio < config(scaling).factor - 0.01))


def test_local_layers_have_a_base_of_their_own_and_are_not_stretched():
    both = config("linear", local_theta=100.0)
    np.testing.assert_allclose(wavelengths(both, 4, local=True)[0], [1, 0.1])
    np.testing.assert_allclose(wavelengths(both, 4, local=False)[0], [1 / 8, 500000**-0.5 / 8])
    shared = config("linear")
    np.testing.assert_array_equal(wavelengths(shared, 4, local=True)[0], wavelengths(shared, 4, local=False)[0])


@pytest.mark.parametrize("kind", ["nope", "local_nope"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_layer_without_positions_rotates_nothing(scaling, kind):
    found = table(config(scaling), H, jnp.arange(5)[None, :], kind)
    np.testing.assert_array_equal(found[0], np.ones((1, 5, H // 2)))
    np.testing.assert_array_equal(found[1], np.zeros((1, 5, H // 2)))


def test_rotation_turns_each_pair_of_halves_as_a_complex_number():
    draw = np.random.default_rng(0)
    x_BTNH, positions_BT = draw.normal(size=(2, 3, 2, H)), np.array([[0, 1, 2], [7, 0, 4000]])
    found = rotate(jnp.float32(x_BTNH), table(config(), H, jnp.asarray(positions_BT), "global"))
    inverse, _ = frequencies("none")
    for b, t, n in np.ndindex(2, 3, 2):
        for pair in range(H // 2):
            turned = complex(x_BTNH[b, t, n, pair], x_BTNH[b, t, n, pair + H // 2]) * cmath.exp(
                1j * positions_BT[b, t] * inverse[pair]
            )
            np.testing.assert_allclose(found[b, t, n, [pair, pair + H // 2]], [turned.real, turned.imag], atol=1e-5)


def test_scores_depend_on_the_distance_alone():
    draw = np.random.default_rng(0)
    q, k = (jnp.float32(draw.normal(size=(1, 1, 1, H))) for _ in range(2))

    def score(at, of):
        turned = [
            rotate(x, table(config(), H, jnp.full((1, 1), position), "global")) for x, position in ((q, at), (k, of))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert math.isclose(score(9, 4), score(4001, 3996), abs_tol=1e-5)
    assert abs(score(9, 4) - score(9, 5)) > 1e-2
    assert abs(score(9, 4) - score(4, 9)) > 1e-2


def test_rotation_keeps_the_dtype_and_rounds_once():
    draw = np.random.default_rng(0)
    x_BTNH, turns = jnp.bfloat16(draw.normal(size=(1, 2, 1, H))), table(config(), H, jnp.array([[3, 4095]]), "global")
    found = rotate(x_BTNH, turns)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, rotate(x_BTNH.astype(jnp.float32), turns).astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(scaling="ntk"), r"model\.rope\.scaling='ntk' must be one of"),
        (dict(theta=float("nan")), r"model\.rope\.theta=nan must be positive"),
        (dict(local_theta=-1.0), r"model\.rope\.local_theta=-1\.0 must be positive, or 0 to take theta"),
        (dict(theta=0.0), r"model\.rope\.theta=0\.0 must be positive"),
        (
            dict(scaling="linear", factor=0.0),
            r"model\.rope\.factor=0\.0 must be positive where model\.rope\.scaling='linear'",
        ),
        (dict(scaling="llama3", original_length=0), r"'llama3' needs original_length > 0"),
        (dict(scaling="yarn", low_frequency=4.0, high_frequency=1.0), r"'yarn' needs .* not 8192, 4\.0 and 1\.0"),
    ],
)
def test_wrong_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        RopeConfig(**(PLAIN | changes))
