"""Equivalents: names that users of Flax, Equinox, BrainState and PyTorch type, and what is written here instead.

Each module of the package that has a ``__getattr__`` ends it with `missing`, and so do the states.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax

# By where the name was looked for. What is in the place of a name is code, or a sentence.
EQUIVALENTS: Mapping[str, Mapping[str, str]] = {
    "mutatis": {
        # Flax NNX and Linen
        **{
            name: f"mu.nn.{name}"
            for name in (
                *(
                    "Linear",
                    "LinearGeneral",
                    "Einsum",
                    "Conv",
                    "ConvTranspose",
                    "Embed",
                    "PReLU",
                    "Dropout",
                    "Sequential",
                ),
                *("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm", "SpectralNorm", "WeightNorm"),
                *(
                    "avg_pool",
                    "max_pool",
                    "min_pool",
                    "pool",
                    "initializers",
                    "relu",
                    "gelu",
                    "silu",
                    "softmax",
                    "tanh",
                ),
            )
        },
        "Dense": "mu.nn.Linear",
        "List": "a plain list: `self.layers = [...]`",
        "Dict": "a plain dict: `self.layers = {...}`",
        "ModuleList": "a plain list: `self.layers = [...]`",
        "ModuleDict": "a plain dict: `self.layers = {...}`",
        "split_rngs": "mu.Rngs(0).split(4)",
        "fork_rngs": "mu.Rngs(0).fork()",
        "RngStream": "mu.RngState",
        "RngKey": "mu.RngState",
        "RngCount": "mu.RngState",
        "VariableState": "mu.State",
        "Object": "mu.Module",
        "Pytree": "mu.Module",
        "ModelAndOptimizer": "mu.Optimizer",
        "MultiMetric": "mu.metrics.MultiMetric",
        "display": "print(model)",
        "iter_graph": "mu.modules(model)",
        "iter_modules": "mu.modules(model)",
        "iter_children": "mu.modules(model)",
        "to_pure_dict": "mu.state(model).to_pure_dict()",
        "replace_by_pure_dict": "mu.update(model, nested_dict)",
        "to_flat_state": "mu.state(model).flat()",
        "from_flat_state": "mu.State.from_flat",
        "filter_state": "state.filter(mu.Param)",
        "with_partitioning": 'mu.Param(x, sharding=("embed", "mlp"))',
        "with_metadata": 'mu.Param(x, tag="a")',
        "cached_partial": "mu.jit",
        "jit_partial": "mu.jit",
        "custom_gradient": "mu.custom_vjp",
        "recursive_map": "mu.replace(model, ..., fn)",
        "set_mode": "model.train(), model.eval()",
        "train_mode": "model.train()",
        "eval_mode": "model.eval()",
        "compact": "`__init__`, where layers are made; `__call__` uses them",
        "OfKind": "mu.OfType",
        "DiffState": "mu.grad(f, wrt=mu.Param)",
        "StateFilter": "mu.Filter",
        # Equinox
        "filter_jit": "mu.jit",
        "filter_grad": "mu.grad",
        "filter_value_and_grad": "mu.value_and_grad",
        "filter_vmap": "mu.vmap",
        "filter_eval_shape": "mu.eval_shape",
        "filter_make_jaxpr": "mu.make_jaxpr",
        "filter_checkpoint": "mu.remat",
        "filter_custom_vjp": "mu.custom_vjp",
        "filter_shard": "mu.jit(f, in_shardings=...)",
        "partition": "mu.split(model, mu.Param, ...)",
        "combine": "mu.merge(definition, params, rest)",
        "tree_at": "mu.replace(model, where, fn)",
        "field": "a plain attribute: static values need no declaration",
        "tree_inference": "model.eval()",
        "inference_mode": "mu.view(model, training=False)",
        "is_array": "a filter: `mu.Param`",
        "StateIndex": "mu.Variable",
        "make_with_state": "Net(), whose states are attributes",
        "apply_updates": "mu.Optimizer(model, tx).update(grads)",
        # BrainState
        "ParamState": "mu.Param",
        "HiddenState": "mu.Hidden",
        "ShortTermState": "mu.Hidden",
        "LongTermState": "mu.Variable",
        "BatchState": "mu.BatchStat",
        "RandomState": "mu.Rngs",
        "StateTraceStack": "mu.inspect.ledger",
        "make_state_traceable": "mu.jit",
        "init_all_states": "mu.reset(model, mu.Hidden, batch_shape=(...,))",
        "reset_all_states": "mu.reset(model, mu.Hidden)",
        "vmap_new_states": "mu.vmap",
        "ifelse": "mu.switch",
        "checkpointed_scan": "mu.scan(f, init, xs, checkpoint_every=10)",
        "checkpointed_for_loop": "mu.scan(f, init, xs, checkpoint_every=10)",
        # PyTorch, JAX
        "no_grad": "with mu.freeze(model)",
        "Parameter": "mu.Param",
        "Tensor": "jax.Array",
        "pmap": "mu.shard_map",
        "tree_map": "jax.tree.map",
    },
    "mutatis.nn": {
        "Module": "mu.Module",
        "Param": "mu.Param",
        "Variable": "mu.Variable",
        "BatchStat": "mu.BatchStat",
        "Cache": "mu.Cache",
        "Intermediate": "mu.Intermediate",
        "Rngs": "mu.Rngs",
        "Optimizer": "mu.Optimizer",
        "Parameter": "mu.Param",
        "Dense": "nn.Linear",
        "Conv1d": "nn.Conv(1, 8, kernel_size=(3,), rngs=rngs)",
        "Conv2d": "nn.Conv(1, 8, kernel_size=(3, 3), rngs=rngs)",
        "BatchNorm1d": "nn.BatchNorm",
        "BatchNorm2d": "nn.BatchNorm",
        "List": "a plain list: `self.layers = [...]`",
        "Dict": "a plain dict: `self.layers = {...}`",
        "ModuleList": "a plain list: `self.layers = [...]`",
        "ModuleDict": "a plain dict: `self.layers = {...}`",
        "compact": "`__init__`, where layers are made; `__call__` uses them",
        "remat": "mu.remat",
        "scan": "mu.scan",
        "vmap": "mu.vmap",
        "jit": "mu.jit",
        "BatchNorm3d": "nn.BatchNorm",
        "InstanceNorm2d": "nn.InstanceNorm",
        "Conv3d": "nn.Conv(1, 8, kernel_size=(3, 3, 3), rngs=rngs)",
        "ConvTranspose1d": "nn.ConvTranspose(1, 8, kernel_size=(3,), rngs=rngs)",
        "ConvTranspose2d": "nn.ConvTranspose(1, 8, kernel_size=(3, 3), rngs=rngs)",
        "Embedding": "nn.Embed(num_embeddings=100, features=8, rngs=rngs)",
        "AvgPool1d": "nn.avg_pool(x, (2,), (2,))",
        "AvgPool2d": "nn.avg_pool(x, (2, 2), (2, 2))",
        "MaxPool1d": "nn.max_pool(x, (2,), (2,))",
        "MaxPool2d": "nn.max_pool(x, (2, 2), (2, 2))",
        "AdaptiveAvgPool1d": "nn.AdaptiveAvgPool((1,))",
        "AdaptiveAvgPool2d": "nn.AdaptiveAvgPool((1, 1))",
        "AdaptiveMaxPool1d": "nn.AdaptiveMaxPool((1,))",
        "AdaptiveMaxPool2d": "nn.AdaptiveMaxPool((1, 1))",
        "Dropout2d": "nn.Dropout(0.5, broadcast_dims=(1, 2), rngs=rngs)",
        "Identity": "nn.identity",
        "Flatten": "x.reshape(len(x), -1)",
        "ReLU": "nn.relu",
        "GELU": "nn.gelu",
        "SiLU": "nn.silu",
        "ELU": "nn.elu",
        "LeakyReLU": "nn.leaky_relu",
        "Sigmoid": "nn.sigmoid",
        "Softmax": "nn.softmax",
        "Softplus": "nn.softplus",
        "Tanh": "nn.tanh",
    },
    "Variable": {
        "get_value": "v.get()",
        "set_value": "v.set(x)",
        "raw_value": "v.value",
        "get_raw_value": "v.get()",
        "set_raw_value": "v.set(x)",
        "get_metadata": "v.metadata",
        "set_metadata": 'mu.Param(v.value, tag="a")',
        "copy_from": "v.set(other.value)",
        "update_from_state": "v.set(other.value)",
        "restore_value": "v.set(x)",
        "unbox": "v.value",
        "type": "type(v)",
    },
}


def equivalent(place: str, name: str) -> str | None:
    """What is written here for a name of another library, or None."""
    known = EQUIVALENTS[place].get(name)
    if known is None and place == "mutatis.nn" and not name.startswith("_") and hasattr(jax.nn, name):
        return f"jax.nn.{name}"
    return known


def missing(place: str, name: str) -> AttributeError:
    """The error for a name that a module does not have: it says what is written instead."""
    text = f"module {place!r} has no attribute {name!r}"
    if (instead := equivalent(place, name)) is not None:
        return AttributeError(f"{text}: write {instead if '`' in instead else f'`{instead}`'}")
    return AttributeError(text)  # Python itself suggests a near one
