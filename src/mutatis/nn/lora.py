"""Low-rank adapters: a layer is changed by a product of two thin matrices, and only these are trained.

`LoRA.apply` puts adapters onto the layers of a model that exists; kernels and biases keep their paths. To train the adapters
only, give ``wrt=nn.LoRAParam`` to `mu.grad` and `mu.Optimizer`. `LoRA.merge` adds the products to the kernels and removes the
adapters. Inside ``with adapters_off(model)`` the model computes as if it had none.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, he_uniform, zeros
from jax.typing import ArrayLike, DTypeLike

from mutatis.core import naming
from mutatis.core.naming import show_path
from mutatis.core.showing import show_class, show_value
from mutatis.errors import ArgumentError, DeferredStateError, FilterError, StructureError
from mutatis.model.filters import FilterLike, as_filter
from mutatis.model.kinds import Param
from mutatis.model.marks import thaw
from mutatis.model.modules import M, Module
from mutatis.model.surgery import modules, replace
from mutatis.model.variables import Held
from mutatis.nn.layers import (
    NO_METADATA,
    Metadata,
    PromoteDtype,
    alike,
    check_input,
    convert,
    param_key,
    promote_dtype,
    total,
    widen,
)
from mutatis.nn.linear import Linear, LinearGeneral
from mutatis.nn.stacked import for_each, made_for_each, own_shape
from mutatis.random import Rngs

T = TypeVar("T")


class LoRAParam(Param[Held]):
    """A parameter of an adapter. With ``wrt=nn.LoRAParam``, `mu.grad` and `mu.Optimizer` see the adapters only."""


def default_a_initializer(key: Any, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    """He's initializer, uniform with variance 2 / fan_in: a function by name, which pickles."""
    return he_uniform()(key, shape, dtype)


class LoRA(Module):
    """A low-rank adapter: the map ``x @ lora_a @ lora_b`` of the last axis, alone or added to the result of another module.

    For a model that exists, `LoRA.apply` puts adapters onto its layers, and `LoRA.merge` adds them to the kernels after
    training.

    Args:
      in_features: the size of the last axis of the input.
      lora_rank: the rank of the map: the size of the axis between `lora_a` and `lora_b`.
      out_features: the size of the last axis of the output.
      base_module: the module to which it is added; it is called with the same input. None adds it to nothing.
      dtype: the dtype of the computation. None takes the common dtype of the input and the parameters.
      param_dtype: the dtype of the parameters.
      a_initializer: the initializer of `lora_a`, as those of `jax.nn.initializers`.
      b_initializer: the initializer of `lora_b`. With zeros, the default, nothing is added before training.
      lora_param_type: the kind of the parameters.
      promote_dtype: the function that brings ``(x, lora_a, lora_b)`` to one dtype; it is called with that tuple and ``dtype=``.
      rngs: random streams; the parameters are drawn from the stream `params`.
      a_metadata, b_metadata: metadata of the parameters, such as ``{"sharding": ("embed", None)}``.
      alpha: a number that scales the map by ``alpha / lora_rank``. None scales by nothing.

    Attributes:
      lora_a: LoRAParam of shape (in_features, lora_rank).
      lora_b: LoRAParam of shape (lora_rank, out_features).
      active: whether the map is added, a bool; see `adapters_off`.

    Raises:
      ArgumentError: the rank is no int above 0, or the base module cannot be called.
      RandomStreamError: there is no stream to draw the parameters from.

    Source:
      Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, https://arxiv.org/abs/2106.09685

    Example:
      >>> import jax.numpy as jnp, mutatis as mu, optax
      >>> from mutatis import nn
      >>> net = nn.Sequential(nn.Linear(3, 8, rngs=mu.Rngs(0)), nn.Linear(8, 2, rngs=mu.Rngs(1)))
      >>> x, _ = jnp.ones(3), nn.LoRA.apply(net, nn.Linear, rank=4)
      >>> optimizer = mu.Optimizer(net, optax.sgd(0.1), wrt=nn.LoRAParam)
      >>> optimizer.update(mu.grad(lambda net: net(x).sum(), wrt=nn.LoRAParam)(net))
      >>> trained = net(x)
      >>> _ = nn.LoRA.merge(net)
      >>> bool(jnp.allclose(net(x), trained)), type(net.layers[0]).__name__
      (True, 'Linear')
    """

    def __init__(
        self,
        in_features: int,
        lora_rank: int,
        out_features: int,
        *,
        base_module: Any = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        a_initializer: Initializer = default_a_initializer,
        b_initializer: Initializer = zeros,
        lora_param_type: type[Param] = LoRAParam,
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: Rngs,
        a_metadata: Metadata = NO_METADATA,
        b_metadata: Metadata = NO_METADATA,
        alpha: float | None = None,
    ) -> None:
        if base_module is not None and not callable(base_module):
            raise ArgumentError(
                "`nn.LoRA` cannot be added to what cannot be called",
                path="base_module",
                expected="a callable module",
                got=show_class(base_module),
                cure="`nn.LoRA(3, 2, 4, base_module=nn.Linear(3, 4, rngs=rngs), rngs=rngs)`",
            )
        rank: Any = lora_rank
        if not (isinstance(rank, int) and rank > 0):
            raise ArgumentError(
                f"`nn.LoRA` cannot be of rank {show_value(lora_rank)}",
                path="lora_rank",
                expected="an int from 1 on",
                got=show_value(lora_rank),
                cure="`nn.LoRA(in_features, 8, out_features, rngs=rngs)`",
            )
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.lora_param_type = lora_param_type
        self.base_module = base_module
        self.promote_dtype = promote_dtype
        self.alpha = alpha
        self.active = True
        key_a, key_b = param_key("LoRA", rngs, a_initializer), param_key("LoRA", rngs, b_initializer)
        self.lora_a = lora_param_type(a_initializer(key_a, (in_features, lora_rank), param_dtype), **a_metadata)
        self.lora_b = lora_param_type(b_initializer(key_b, (lora_rank, out_features), param_dtype), **b_metadata)

    def __call__(self, x: ArrayLike, **kwargs: Any) -> jax.Array:
        """Apply the map to the last axis, and add it to the result of the base module.

        Args:
          x: an array of floats, of shape (..., in_features).
          **kwargs: keyword arguments for the base module.

        Returns:
          An array of shape (..., out_features).

        Raises:
          ArgumentError: the input has another number of features.
        """
        x = jnp.asarray(x)
        check_input(self.lora_a, x, along=0)
        base = None if self.base_module is None else self.base_module(x, **kwargs)
        if not self.active:
            return jnp.zeros((*x.shape[:-1], self.out_features), x.dtype) if base is None else base
        x, a, b = self.promote_dtype((x, self.lora_a.value, self.lora_b.value), dtype=self.dtype)
        out = x @ a @ b
        if self.alpha is not None:
            out = out * self._scale(a)
        return out if base is None else total(out, base)

    def _scale(self, a: jax.Array) -> float:
        return 1.0 if self.alpha is None else self.alpha / a.shape[1]

    def _added(self, kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        """A kernel and what the adapter adds to it."""
        wide = alike(*(convert(part, widen(part.dtype)) for part in (a, b)))
        product = jnp.matmul(*wide, precision="highest") * self._scale(a)
        return convert(total(kernel, product.reshape(kernel.shape)), kernel.dtype)

    @staticmethod
    def apply(
        model: T,
        where: FilterLike,
        rank: int,
        *,
        alpha: float | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        a_initializer: Initializer = default_a_initializer,
        lora_param_type: type[Param] = LoRAParam,
        rngs: Rngs | None = None,
    ) -> T:
        """Put adapters onto `Linear` and `LinearGeneral` layers of a model, which is changed in place.

        Their kernels and biases stay the same states under the same paths. The adapter of a layer is its attribute `lora`.
        In an `nn.Stack`, or a model that `mu.vmap` has made, each of the stacked layers gets an adapter of its own.
        Modules of other classes that the filter selects stay as they are.

        Args:
          model: a Module, or a list, tuple or dict of them.
          where: a filter: which layers get an adapter, such as ``nn.Linear`` or a function of (path, module).
          rank: their rank.
          alpha, a_initializer, lora_param_type: as in `LoRA`.
          dtype: the dtype of the computation of the adapters. None takes that of the layer.
          param_dtype: the dtype of the adapters' parameters. None takes that of the kernel.
          rngs: random streams; the parameters are drawn from the stream `params`. None takes ``mu.Rngs(0)``.

        Returns:
          The model. If `model` is such a layer itself, the layer that replaces it.

        Raises:
          FilterError: no such layer is selected.
          StructureError: a layer has an adapter already. Nothing has changed then.
        """
        streams = Rngs(0) if rngs is None else rngs
        selects = as_filter(where)
        chosen = {
            path: module
            for path, module in modules(model, selects).items()
            if isinstance(module, Linear | LinearGeneral)
        }
        if not chosen:
            raise FilterError(
                f"no layer that takes an adapter is selected by {show_value(where)}",
                expected="layers of class `Linear` or `LinearGeneral`",
                got=", ".join(show_path(path) or "." for path in modules(model, selects)) or "no modules",
                cure="`mu.modules(model, nn.Linear)` lists them; another layer takes one by its call: "
                "`mu.replace(model, path, lambda old: nn.LoRA(n, rank, m, base_module=old, rngs=rngs))`.",
            )

        def adapted(layer: Any) -> Any:
            path = next(path for path, module in chosen.items() if module is layer)
            kind = _class_for(path, layer)
            axes = _kernel_axes(layer)
            options: dict[str, Any] = {
                "dtype": layer.dtype if dtype is None else dtype,
                "param_dtype": layer.kernel.dtype if param_dtype is None else param_dtype,
                "a_initializer": a_initializer,
                "lora_param_type": lora_param_type,
                "alpha": alpha,
            }
            outputs = layer.out_features if isinstance(layer, Linear) else math.prod(layer.out_features)
            inputs = math.prod(own_shape(layer.kernel, axes)) // outputs

            def make(rngs: Rngs) -> LoRA:
                return LoRA(inputs, rank, outputs, rngs=rngs, **options)

            return _same_as(layer, kind, lora=made_for_each(make, layer.kernel, axes, streams))

        return replace(model, lambda path, module: any(module is layer for layer in chosen.values()), adapted)

    @staticmethod
    def merge(model: T) -> T:
        """Add the adapters of a model to its kernels, also to frozen ones, and remove them. The model is changed in place.

        Args:
          model: a Module, or a list, tuple or dict of them.

        Returns:
          The model. If `model` is a layer with an adapter itself, the layer that replaces it.

        Raises:
          StructureError: an adapter belongs to no `Linear` or `LinearGeneral`, or several modules use its kernel. Nothing has
            changed then.
          FilterError: there are no adapters.
        """
        every = modules(model)
        layers: list[Any] = [module for module in every.values() if isinstance(module, LoRALinear | LoRALinearGeneral)]
        inside = [layer.lora for layer in layers]
        for path, module in every.items():
            if isinstance(module, LoRA) and not any(module is lora for lora in inside):
                if module.base_module is None or not isinstance(module.base_module, Linear):
                    raise _unmerged(path, module)
                layers.append(module)
        holders = [cell for module in every.values() for cell in vars(module).values() if isinstance(cell, Param)]

        def merged(layer: Any) -> Any:
            base = layer.base_module if isinstance(layer, LoRA) else layer
            lora = layer if isinstance(layer, LoRA) else layer.lora
            kernel = base.kernel
            if sum(cell is kernel for cell in holders) > 1:
                raise StructureError(
                    f"the adapter of {naming.describe(kernel)} cannot be merged: other modules use the same kernel",
                    path=next(show_path(path) for path, module in every.items() if module is base),
                    expected="a kernel of one layer",
                    got="a kernel that several modules hold",
                    made_at=kernel.made_at,
                    cure="Give the layer a kernel of its own, `layer.kernel = mu.Param(layer.kernel.value)`, and merge then.",
                )
            with thaw(kernel):
                kernel.value = for_each(lora._added, (kernel, _kernel_axes(base)), (lora.lora_a, 2), (lora.lora_b, 2))
            return base if isinstance(layer, LoRA) else _same_as(layer, type(layer)._plain)

        return replace(model, lambda path, module: any(module is layer for layer in layers), merged)


def _same_as(layer: Any, kind: type[M], **more: Any) -> M:
    """A module of another class with the same attributes."""
    other = kind.__new__(kind)
    for name, value in {**vars(layer), **more}.items():
        if name != "lora" or name in more:
            setattr(other, name, value)
    return other


class LoRALinear(Linear):
    """A `Linear` with an adapter: ``x @ kernel + bias + x @ lora_a @ lora_b``. The states of the `Linear` have the same paths.

    Args:
      in_features, out_features: as in `Linear`.
      lora_rank: the rank of the adapter.
      lora_dtype, lora_param_dtype, lora_promote_dtype: `dtype`, `param_dtype` and `promote_dtype` of the adapter, as in `LoRA`.
      a_initializer, b_initializer, lora_param_type, a_metadata, b_metadata, alpha: as in `LoRA`.
      rngs: random streams; the parameters are drawn from the stream `params`.
      **options: further arguments of `Linear`.

    Attributes:
      kernel, bias: as in `Linear`.
      lora: LoRA, the adapter.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> layer = mu.nn.LoRALinear(3, 4, lora_rank=2, rngs=mu.Rngs(0))
      >>> layer(jnp.ones(3)).shape, layer.lora.lora_a.shape
      ((4,), (3, 2))
    """

    _plain = Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        lora_rank: int,
        lora_dtype: DTypeLike | None = None,
        lora_param_dtype: DTypeLike = jnp.float32,
        a_initializer: Initializer = default_a_initializer,
        b_initializer: Initializer = zeros,
        lora_param_type: type[Param] = LoRAParam,
        lora_promote_dtype: PromoteDtype = promote_dtype,
        rngs: Rngs,
        a_metadata: Metadata = NO_METADATA,
        b_metadata: Metadata = NO_METADATA,
        alpha: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, rngs=rngs, **options)
        self.lora = LoRA(
            in_features,
            lora_rank,
            out_features,
            dtype=lora_dtype,
            param_dtype=lora_param_dtype,
            a_initializer=a_initializer,
            b_initializer=b_initializer,
            lora_param_type=lora_param_type,
            promote_dtype=lora_promote_dtype,
            rngs=rngs,
            a_metadata=a_metadata,
            b_metadata=b_metadata,
            alpha=alpha,
        )

    def __call__(self, inputs: ArrayLike, out_sharding: Any = None) -> jax.Array:
        """Apply the map of `Linear` to the last axis, and add that of the adapter.

        Args:
          inputs: an array of floats, of shape (..., in_features).
          out_sharding: the sharding of the result, on a mesh whose axes are explicit.

        Returns:
          An array of shape (..., out_features).

        Raises:
          ArgumentError: the input has another number of features, or holds integers.
        """
        y = super().__call__(inputs, out_sharding)
        return total(y, self.lora(inputs)) if self.lora.active else y


class LoRALinearGeneral(LinearGeneral):
    """A `LinearGeneral` with an adapter, which maps all input features to all output features; `LoRA.apply` makes it.

    Attributes:
      kernel, bias: as in `LinearGeneral`.
      lora: LoRA from ``prod(in_features)`` to ``prod(out_features)``, the adapter.

    Example:
      >>> import mutatis as mu
      >>> layer = mu.nn.LoRA.apply(mu.nn.LinearGeneral(16, (4, 8), rngs=mu.Rngs(0)), mu.nn.LinearGeneral, rank=2)
      >>> type(layer).__name__, layer.lora.lora_b.shape
      ('LoRALinearGeneral', (2, 32))
    """

    _plain = LinearGeneral
    lora: LoRA

    def __call__(self, inputs: ArrayLike, out_sharding: Any = None) -> jax.Array:
        """Apply the map of `LinearGeneral`, and add that of the adapter: the axes that are not mapped, and then `out_features`.

        Args:
          inputs: an array of floats with the sizes `in_features` along `axis`.
          out_sharding: the sharding of the result, on a mesh whose axes are explicit.

        Raises:
          ArgumentError: the input has other sizes, or holds integers.
        """
        if "lora" not in vars(self):
            cure = "Give adapters to the layers of a model: `nn.LoRA.apply(model, nn.LinearGeneral, rank, rngs=rngs)`."
            raise StructureError("an `nn.LoRALinearGeneral` that was made by itself has no adapter", cure=cure)
        y = super().__call__(inputs, out_sharding)
        if not self.lora.active:
            return y
        x = jnp.moveaxis(jnp.asarray(inputs), self.axis, range(-len(self.axis), 0))
        flat = x.reshape(*x.shape[: x.ndim - len(self.axis)], -1)
        return total(y, self.lora(flat).reshape(y.shape))


def _kernel_axes(layer: Any) -> int:
    """The number of axes that the kernel of one layer has."""
    return 2 if isinstance(layer, Linear) else len(layer.axis) + len(layer.out_features)


def _class_for(path: Any, layer: Any) -> Any:
    """The class of a layer with an adapter.

    Raises:
      StructureError: the layer has one, or its class has a meaning of its own.
      DeferredStateError: the layer's size is not known yet.
    """
    name = show_path(path) or "."
    if type(layer) not in (Linear, LinearGeneral) or (type(layer) is LinearGeneral and layer.batch_axis):
        adapted = isinstance(layer, LoRALinear | LoRALinearGeneral)
        raise StructureError(
            f"layer `{name}` cannot take an adapter{': it has one' if adapted else ''}",
            path=name,
            expected="a layer of class `Linear`, or `LinearGeneral` without batch axes",
            got=type(layer).__name__,
            cure="`nn.LoRA.merge(model)` first, or choose the layers: `nn.LoRA.apply(model, lambda path, module: "
            "type(module) is nn.Linear, rank)`.",
        )
    if layer.kernel.deferred:
        raise DeferredStateError(
            f"layer `{name}` cannot take an adapter: its kernel has not been created yet",
            path=name,
            made_at=layer.kernel.made_at,
            cure="Call the model once before, or give the sizes where its layers are made.",
        )
    return LoRALinear if type(layer) is Linear else LoRALinearGeneral


def _unmerged(path: Any, module: LoRA) -> StructureError:
    return StructureError(
        f"adapter `{show_path(path) or '.'}` cannot be merged: it is not added to a kernel",
        path=show_path(path),
        expected="an adapter of a `Linear` or `LinearGeneral`",
        got="no base module" if module.base_module is None else f"a base module {show_class(module.base_module)}",
        cure="Merge the parts of the model that `nn.LoRA.apply` changed: `nn.LoRA.merge(model.trunk)`.",
    )


@contextlib.contextmanager
def adapters_off(model: T) -> Iterator[T]:
    """A context in which the adapters of a model add nothing: the model computes as if it had none.

    It works in compiled functions, too. Programs with and without adapters are kept side by side. A view or copy of the model
    that was made before is another object, whose adapters stay on.

    Args:
      model: a Module, or a list, tuple or dict of them.

    Example:
      >>> import jax.numpy as jnp, mutatis as mu
      >>> from mutatis import nn
      >>> net = nn.Sequential(nn.Linear(3, 2, rngs=mu.Rngs(0)))
      >>> before = net(jnp.ones(3))
      >>> for cell in mu.variables(nn.LoRA.apply(net, nn.Linear, rank=2), nn.LoRAParam).values():
      ...     cell.value += 1
      >>> with nn.adapters_off(net):
      ...     bool((net(jnp.ones(3)) == before).all())
      True
      >>> bool((net(jnp.ones(3)) == before).all())
      False
    """
    before = [(adapter, adapter.active) for adapter in modules(model, LoRA).values()]
    for adapter, _ in before:
        adapter.active = False
    try:
        yield model
    finally:
        for adapter, active in before:
            adapter.active = active
