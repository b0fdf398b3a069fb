"""Schedules and optimisers of the probes, beside the protocols' formulas in float64 and optax."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from protocol_formulas import ade20k_rate, imagenet_rate, nyuv2_beta1, nyuv2_rate, vjepa2_rate

from omnistream_jax.evals.probes.base import Heads
from omnistream_jax.evals.probes.optimizers import AdamW, Sgd
from omnistream_jax.evals.probes.schedules import Cosine, OneCycleBeta, WarmupOneCycle

SCHEDULES = {
    "imagenet": (Cosine(12_500), imagenet_rate, 12_500),
    "nyuv2": (WarmupOneCycle(38_400, 12_800, end_divisor=25_000, start_divisor=1_000), nyuv2_rate, 38_400),
    "ade20k": (
        WarmupOneCycle(40_000, 1_500, end_divisor=math.inf, warmup_ratio=1e-6, lag=1),
        ade20k_rate,
        40_000,
    ),
    "vjepa2": (Cosine(20 * 964, lead=1), vjepa2_rate, 20 * 964),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates_are_the_protocols(name):
    schedule, formula, steps = SCHEDULES[name]
    turn = getattr(schedule, "warmup_steps", 0)
    places = [0, 1, 2, 7, turn - 1, turn, turn + 1, turn + 2, steps // 2, steps - 100, steps - 1]
    places = sorted({place for place in places if place >= 0})
    actual = np.array([jax.jit(schedule)(place) for place in places])
    expected = np.array([formula(place) for place in places])
    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=1e-30)
    tens = np.linspace(0, steps - 1, 10).astype(int)
    np.testing.assert_allclose(schedule(tens), [formula(place) for place in tens], rtol=2e-6, atol=1e-30)


def test_ade20k_begins_with_the_same_learning_rate_twice_and_at_a_millionth():
    schedule = SCHEDULES["ade20k"][0]
    rates = [float(schedule(step)) for step in range(3)]
    assert rates[0] == rates[1] < rates[2]
    assert rates[0] == pytest.approx(1e-6, rel=1e-5)


def test_vjepa2_ends_with_a_step_that_changes_nothing():
    assert float(Cosine(100, lead=1)(99)) == pytest.approx(0, abs=1e-7)
    assert float(Cosine(100)(99)) > 1e-4


def test_beta1_of_nyuv2_is_zero_during_warmup_then_rises():
    beta1 = OneCycleBeta(38_400, 12_800, (0.85, 0.95))
    places = [0, 1, 6_400, 12_798, 12_799, 12_800, 12_801, 20_000, 30_000, 38_399]
    actual = [float(beta1(place)) for place in places]
    np.testing.assert_allclose(actual, [nyuv2_beta1(place) for place in places], rtol=1e-6)


def test_linear_warmup():
    schedule = Cosine(110, warmup_steps=10)
    np.testing.assert_allclose([schedule(step) for step in (0, 5, 10, 60)], [0, 0.5, 1, 0.5], atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cosine(0), "steps: expected 1 or more"),
        (lambda: Cosine(10, warmup_steps=11), "warmup_steps: expected 0 to 10"),
        (lambda: Cosine(10, lead=2), "lead: expected 0 or 1"),
        (lambda: WarmupOneCycle(10, 2, 10.0, lag=3), "lag: expected 0 or 1"),
        (lambda: WarmupOneCycle(10, 2, 0.5), "end_divisor: expected 1 or more"),
        (lambda: WarmupOneCycle(10, 2, 10.0, start_divisor=0.0), "start_divisor: expected 1 or more"),
        (lambda: OneCycleBeta(10, 2, (0.5, 1.0)), "beta1: expected two values"),
        (lambda: Sgd(1.0), "momentum: expected 0 to 1"),
        (lambda: AdamW(beta2=1.0), "beta2: expected 0 to 1"),
        (lambda: AdamW(clip_norm=-1.0), "clip_norm: expected 0 or more"),
        (lambda: Heads((), ()), "heads: expected as many weight decays"),
        (lambda: Heads((1.0, 2.0), (0.1,)), "heads: expected as many weight decays"),
        (lambda: Heads((-1.0,), (0.0,)), "learning_rates: expected 0 or more"),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_sweep_is_every_rate_with_every_decay():
    heads = Heads.sweep((1.0, 2.0), (0.1, 0.2, 0.3), scale=4.0)
    assert heads.learning_rates == (4.0, 4.0, 4.0, 8.0, 8.0, 8.0)
    assert heads.weight_decays == (0.1, 0.2, 0.3, 0.1, 0.2, 0.3)


def run(optimizer, params, gradients, rates, decay):
    state = optimizer.init(params)
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True)):
        params, state = optimizer.update(gradient, state, params, jnp.int32(step), rate, decay)
    return params


def random_trees(steps):
    generator = np.random.default_rng(0)

    def draw():
        return {"kernel": generator.normal(size=(5, 3)).astype(np.float32), "bias": generator.normal(size=3)}

    trees = [jax.tree.map(jnp.float32, draw()) for _ in range(steps + 1)]
    return trees[0], trees[1:]


def optax_run(make, params, gradients, rates):
    count = iter(range(len(rates)))
    for_step = optax.inject_hyperparams(make)(learning_rate=0.0)
    state = for_step.init(params)
    for gradient in gradients:
        state.hyperparams["learning_rate"] = rates[next(count)]
        updates, state = for_step.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_sgd_equals_optax(decay):
    params, gradients = random_trees(6)
    rates = [0.1, 0.2, 0.05, 0.1, 0.3, 0.01]

    # PyTorch's momentum adds gradients, and the present learning rate scales their sum; so does optax's trace.
    def make(learning_rate):
        return optax.chain(
            optax.add_decayed_weights(decay), optax.trace(0.9), optax.scale_by_learning_rate(learning_rate)
        )

    expected = optax_run(make, params, gradients, rates)
    actual = run(Sgd(0.9), params, gradients, rates, decay)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), actual, expected)


@pytest.mark.parametrize("clip", [0.0, 1.5])
def test_adamw_equals_optax(clip):
    params, gradients = random_trees(6)
    rates = [0.1, 0.2, 0.05, 0.1, 0.3, 0.01]

    def make(learning_rate):
        clipping = optax.clip_by_global_norm(clip) if clip else optax.identity()
        return optax.chain(clipping, optax.adamw(learning_rate, b1=0.9, b2=0.99, weight_decay=0.3))

    expected = optax_run(make, params, gradients, rates)
    actual = run(AdamW(0.9, 0.99, clip_norm=clip), params, gradients, rates, 0.3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), actual, expected)


def test_adamw_with_a_beta_of_the_step():
    """PyTorch's rule in float64: the correction takes the present beta to the power of the count."""
    params, gradients = random_trees(7)
    beta = OneCycleBeta(7, 3, (0.85, 0.95))
    value, mean, square = np.float64(params["kernel"]), 0.0, 0.0
    for step, tree in enumerate(gradients):
        gradient, b1 = np.float64(tree["kernel"]), float(beta(step))
        mean, square = b1 * mean + (1 - b1) * gradient, 0.99 * square + 0.01 * gradient**2
        value = value * (1 - 0.1 * 0.2)
        value -= 0.1 * (mean / (1 - b1 ** (step + 1))) / (np.sqrt(square / (1 - 0.99 ** (step + 1))) + 1e-8)
    actual = run(AdamW(beta, 0.99), params, gradients, [0.1] * 7, 0.2)
    np.testing.assert_allclose(actual["kernel"], value, rtol=1e-5)
