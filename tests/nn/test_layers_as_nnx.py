"""Every layer beside that of Flax NNX: the same draws, outputs, states and gradients, under every transform.

One table: layer x transform x dtype x train / eval.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu
from mutatis import nn

nnx = pytest.importorskip("flax.nnx")

pytestmark = pytest.mark.once  # many alike; each layer's own file has what JAX's versions may differ in

Make = Callable[..., Any]  # of a library's layers, its random streams and options


@dataclasses.dataclass(frozen=True)
class Case:
    make: Make
    shape: tuple[int, ...]
    integers: bool = False
    modes: bool = False  # whether training and evaluation differ
    narrow: bool = True  # whether it takes a dtype to compute in
    call: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        return "case"


KERNEL_MASK = np.arange(3 * 3 * 4 * 4).reshape(3, 3, 4, 4) % 3 > 0
MASK = (np.arange(2 * 5 * 4) % 5 < 3).reshape(2, 5, 4)
NORMAL = jax.nn.initializers.normal(1.0)


def layer(name: str, *args: Any, **kwargs: Any) -> Make:
    """A layer that both libraries have."""
    return lambda lib, rngs, **options: getattr(lib, name)(*args, rngs=rngs, **kwargs, **options)


def around(name: str, inner: Make, **kwargs: Any) -> Make:
    return lambda lib, rngs, **options: getattr(lib, name)(inner(lib, rngs, **options), rngs=rngs, **kwargs, **options)


def sequence(lib: Any, rngs: Any, **options: Any) -> Any:
    linear = functools.partial(lib.Linear, rngs=rngs, **options)
    return lib.Sequential(linear(4, 8), lib.relu, lib.LayerNorm(8, rngs=rngs, **options), linear(8, 3), lib.tanh)


IMAGES, ROWS = (2, 5, 6, 4), (2, 5, 4)
CASES = {
    "linear": Case(layer("Linear", 4, 3), ROWS),
    "linear-no-bias": Case(layer("Linear", 4, 3, use_bias=False, bias_init=NORMAL), ROWS),
    "linear-wide": Case(layer("Linear", 4, 3, preferred_element_type=jnp.float32, bias_init=NORMAL), ROWS),
    "general": Case(layer("LinearGeneral", 4, (2, 3)), ROWS),
    "general-axes": Case(layer("LinearGeneral", (5, 4), 3, axis=(1, -1), bias_init=NORMAL), (2, 5, 2, 4)),
    "general-batch": Case(layer("LinearGeneral", 4, (3, 2), batch_axis={0: 2, 1: 5}), (2, 5, 3, 4)),
    "einsum": Case(layer("Einsum", "nta,hab->nthb", (3, 4, 2), (3, 2)), ROWS),
    "einsum-dots": Case(layer("Einsum", "...a,ab->...b", (4, 3)), ROWS),
    "conv": Case(layer("Conv", 4, 3, (3, 2)), IMAGES),
    "conv-strides": Case(layer("Conv", 4, 3, (3, 2), strides=(2, 1), padding=((1, 0), (2, 1))), IMAGES),
    "conv-groups": Case(layer("Conv", 4, 6, (3, 3), padding=1, feature_group_count=2, kernel_dilation=2), IMAGES),
    "conv-mask": Case(layer("Conv", 4, 4, (3, 3), mask=KERNEL_MASK), IMAGES),
    "conv-circular": Case(layer("Conv", 4, 3, (4, 3), strides=2, padding="CIRCULAR", kernel_dilation=(1, 2)), IMAGES),
    "conv-reflect": Case(layer("Conv", 4, 3, (2, 3), padding="REFLECT"), IMAGES),
    "conv-causal": Case(layer("Conv", 4, 3, 3, padding="CAUSAL", kernel_dilation=2), ROWS),
    "conv-batches": Case(layer("Conv", 4, 3, 3, padding="VALID"), IMAGES),
    "transposed": Case(layer("ConvTranspose", 4, 3, (3, 2), strides=2), IMAGES),
    "transposed-valid": Case(layer("ConvTranspose", 4, 3, (3, 2), strides=(2, 1), padding="VALID"), IMAGES),
    "transposed-dilated": Case(layer("ConvTranspose", 4, 3, 3, padding=((1, 2),), kernel_dilation=2), ROWS),
    "transposed-circular": Case(layer("ConvTranspose", 4, 3, (4, 3), strides=(2, 3), padding="CIRCULAR"), IMAGES),
    "transposed-kernel": Case(
        layer("ConvTranspose", 4, 4, (3, 3), strides=2, transpose_kernel=True, padding="CIRCULAR", mask=KERNEL_MASK),
        IMAGES,
    ),
    "embed": Case(layer("Embed", 7, 3), (2, 5), integers=True),
    "embed-one": Case(layer("Embed", 1, 3), (2, 5), integers=True),
    "batch-norm": Case(layer("BatchNorm", 4, momentum=0.9), ROWS, modes=True),
    "batch-norm-two-passes": Case(
        layer("BatchNorm", 5, axis=1, use_fast_variance=False, use_scale=False), ROWS, modes=True
    ),
    "batch-norm-mask": Case(layer("BatchNorm", 4, bias_init=NORMAL), ROWS, modes=True, call={"mask": MASK}),
    "layer-norm": Case(layer("LayerNorm", 4, scale_init=NORMAL, bias_init=NORMAL), ROWS),
    "layer-norm-axes": Case(layer("LayerNorm", 20, reduction_axes=(1, 2), feature_axes=(1, 2)), ROWS),
    "layer-norm-mask": Case(layer("LayerNorm", 4, reduction_axes=(-2, -1), use_bias=False), ROWS, call={"mask": MASK}),
    "layer-norm-two-passes": Case(layer("LayerNorm", 4, use_fast_variance=False, use_scale=False), ROWS),
    "rms-norm": Case(layer("RMSNorm", 4, scale_init=NORMAL), ROWS),
    "rms-norm-mask": Case(
        layer("RMSNorm", 4, epsilon=1e-2), ROWS, call={"mask": MASK | (MASK.sum(-1) == 0)[..., None]}
    ),
    "group-norm": Case(layer("GroupNorm", 4, num_groups=2), IMAGES),
    "group-norm-size": Case(layer("GroupNorm", 4, None, 4, use_fast_variance=False), ROWS),
    "group-norm-mask": Case(layer("GroupNorm", 4, 2), ROWS, call={"mask": MASK}),
    "instance-norm": Case(layer("InstanceNorm", 4, scale_init=NORMAL), IMAGES),
    "instance-norm-axes": Case(layer("InstanceNorm", 20, feature_axes=(1, 3)), IMAGES),
    "spectral-norm": Case(around("SpectralNorm", layer("Linear", 4, 3)), ROWS, modes=True),
    "spectral-norm-conv": Case(around("SpectralNorm", layer("Conv", 4, 3, 3), n_steps=2), ROWS, modes=True),
    "weight-norm": Case(around("WeightNorm", layer("Linear", 4, 3)), ROWS),
    "weight-norm-whole": Case(around("WeightNorm", layer("Linear", 4, 3), feature_axes=None, use_scale=False), ROWS),
    "prelu": Case(lambda lib, rngs, **options: lib.PReLU(0.3, **options), ROWS),
    "dropout": Case(layer("Dropout", 0.5), ROWS, modes=True, narrow=False),
    "dropout-dims": Case(layer("Dropout", 0.25, broadcast_dims=(1,)), ROWS, modes=True, narrow=False),
    "sequential": Case(sequence, ROWS),
}
# Where the weights of Flax are overwritten by normalized ones, which ours are not.
OVERWRITES = ("spectral-norm", "weight-norm")
CALLS = 2
TOLERANCE = {"float32": 2e-5, "bfloat16": 4e-2}


def flat(theirs: Any) -> dict[Any, Any]:
    """What a layer of Flax holds, without random streams."""
    state = nnx.state(theirs, nnx.Not(nnx.RngState))
    return {path: jnp.asarray(cell[...]) for path, cell in nnx.to_flat_state(state)}


def ours_and_theirs(name: str, dtype: str, training: bool = True) -> tuple[Any, Any]:
    """A layer of each library, with the same states: those they draw, moved so that no two numbers are alike."""
    case = CASES[name]
    options = {"dtype": jnp.dtype(dtype)} if case.narrow and dtype != "float32" else {}
    ours, theirs = case.make(nn, mu.Rngs(0), **options), case.make(nnx, nnx.Rngs(0), **options)
    for path, cell in nnx.to_flat_state(nnx.state(theirs, nnx.Param)):
        shift = 0.1 * jnp.sin(1 + jnp.arange(cell[...].size)).reshape(cell.shape)
        cell[...] = cell[...] + shift
        mu.variables(ours)[path].value = cell[...]
    if not training:
        ours.eval()
        theirs.eval()
    return ours, theirs


def inputs(name: str, dtype: str) -> jax.Array:
    """Inputs for several calls; the first axis counts these."""
    case = CASES[name]
    shape = (CALLS, *case.shape)
    if case.integers:
        return jnp.arange(np.prod(shape)).reshape(shape) * 3 % 7
    x = jax.random.normal(jax.random.key(1), shape) + 0.5
    return x if case.narrow else x.astype(dtype)


def loss(y: jax.Array) -> jax.Array:
    return jnp.sum(y.astype(jnp.float32) * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))


def as_flax_does() -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    stack.enter_context(jax.numpy_dtype_promotion("standard"))
    stack.enter_context(jax.numpy_rank_promotion("allow"))
    return stack


@functools.cache
def reference(name: str, dtype: str, training: bool) -> Any:
    """What Flax gives: the results of several calls, and the states after them."""
    _, theirs = ours_and_theirs(name, dtype, training)
    with as_flax_does():
        ys = nnx.jit(lambda m, xs: [m(x, **CASES[name].call) for x in xs])(theirs, inputs(name, dtype))
    return ys, flat(theirs)


def reference_gradients(name: str, dtype: str) -> dict[Any, Any]:
    _, theirs = ours_and_theirs(name, dtype)
    with as_flax_does():
        gradients = nnx.jit(nnx.grad(lambda m, x: loss(m(x, **CASES[name].call))))(theirs, inputs(name, dtype)[0])
    return {path: cell[...] for path, cell in nnx.to_flat_state(gradients)}


def run_eager(ours: Any, xs: Any, call: Any) -> Any:
    return [ours(x, **call) for x in xs]


def run_jit(ours: Any, xs: Any, call: Any) -> Any:
    jitted = mu.jit(lambda m, x: m(x, **call))
    return [jitted(ours, x) for x in xs]


def run_scan(ours: Any, xs: Any, call: Any) -> Any:
    steps = mu.jit(lambda m, xs: mu.scan(lambda carry, x: (carry, m(x, **call)), None, xs)[1])
    return steps(ours, xs)


def run_vmap(ours: Any, xs: Any, call: Any) -> Any:
    return mu.vmap(lambda x: ours(x, **call))(xs)


TRANSFORMS = {"eager": run_eager, "jit": run_jit, "scan": run_scan, "vmap": run_vmap}
# What the normal run leaves out: `make test-all` has every row.
SLOW = {("eager", "bfloat16"), ("scan", "bfloat16"), ("vmap", "bfloat16")}
ROWS_OF_TABLE = [
    pytest.param(name, transform, dtype, training, marks=[pytest.mark.slow] if (transform, dtype) in SLOW else [])
    for name, case in CASES.items()
    for transform in TRANSFORMS
    for dtype in TOLERANCE
    for training in ((True, False) if case.modes else (True,))
    # Each lane would move the statistics of a batch of its own, or draw numbers of its own.
    if not (transform == "vmap" and case.modes and training)
]


def close(got: Any, want: Any, dtype: str) -> None:
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize(("name", "transform", "dtype", "training"), ROWS_OF_TABLE)
def test_outputs_and_states(name: str, transform: str, dtype: str, training: bool) -> None:
    ours, _ = ours_and_theirs(name, dtype, training)
    ys, after = reference(name, dtype, training)
    got = TRANSFORMS[transform](ours, inputs(name, dtype), CASES[name].call)
    assert got[0].dtype == ys[0].dtype
    close(got, ys, dtype)
    states = mu.state(ours, mu.Not(mu.RngState)).flat()
    assert set(states) == set(after)
    for path, value in states.items():
        if not name.startswith(OVERWRITES):
            close(value, after[path], dtype)


@pytest.mark.parametrize(
    ("dtype", "jitted"),
    [
        ("float32", True),
        pytest.param("float32", False, marks=pytest.mark.slow),
        pytest.param("bfloat16", True, marks=pytest.mark.slow),
        pytest.param("bfloat16", False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("dropout")])
def test_gradients(name: str, dtype: str, jitted: bool) -> None:
    ours, _ = ours_and_theirs(name, dtype)
    x = inputs(name, dtype)[0]
    gradient = mu.grad(lambda m: loss(m(x, **CASES[name].call)))
    got = (mu.jit(gradient) if jitted else gradient)(ours).flat()
    want = reference_gradients(name, dtype)
    assert set(got) == set(mu.variables(ours, mu.Param)) >= set(want)  # scales of weights were no Param in Flax 0.12.8
    for path, value in want.items():
        scale = max(1.0, float(jnp.max(jnp.abs(value))))
        close(got[path] / scale, value / scale, dtype)


@pytest.mark.parametrize("name", CASES)
def test_draws(name: str) -> None:
    """The same seed gives the same numbers, to the bit, and leaves the streams where Flax leaves them."""
    rngs, their_rngs = mu.Rngs(3), nnx.Rngs(3)
    ours, theirs = CASES[name].make(nn, rngs), CASES[name].make(nnx, their_rngs)
    drawn = flat(theirs)
    states = mu.state(ours, mu.Not(mu.RngState)).flat()
    assert {path: (v.shape, v.dtype) for path, v in states.items()} == {p: (v.shape, v.dtype) for p, v in drawn.items()}
    for path, value in states.items():
        np.testing.assert_array_equal(value, drawn[path], err_msg=str(path))
    assert jax.random.key_data(rngs.params()).tolist() == jax.random.key_data(their_rngs.params()).tolist()
