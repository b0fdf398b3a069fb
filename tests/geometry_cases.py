"""What the tests of geometry share."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.test_util import check_vjp


def compiled(function: Callable, **options) -> Callable:
    """As jax.jit with its options, to NumPy arrays. The compiler does not optimise: that takes half the time."""
    program = jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **options)
    return functools.wraps(function)(lambda *args, **kwargs: jax.tree.map(np.asarray, program(*args, **kwargs)))


def check_gradients(function: Callable, *arguments: np.ndarray) -> tuple[np.ndarray, ...]:
    """Asserts that gradients are those of finite differences, in float64; those of the sum of all outputs, finite."""
    with jax.enable_x64(True):
        run = compiled(lambda arguments, cotangents: _value_and_pullback(function, arguments, cotangents))
        ones = jax.tree.map(lambda output: np.ones(output.shape), jax.eval_shape(function, *arguments))

        def forward(*at):
            return run(at, ones)[0]

        check_vjp(forward, lambda *at: (forward(*at), lambda cotangents: run(at, cotangents)[1]), arguments)
        gradients = run(arguments, ones)[1]
    assert all(gradient.dtype == np.float64 and np.isfinite(gradient).all() for gradient in gradients)
    return gradients


def _value_and_pullback(function: Callable, arguments: tuple, cotangents: object) -> tuple:
    value, pullback = jax.vjp(function, *arguments)
    return value, pullback(cotangents)
