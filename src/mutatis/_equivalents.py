"""Equivalents: names that users of Flax, Equinox, BrainState and PyTorch type, and what is written here instead.

Each module of the package that has a ``__getattr__`` ends it with `missing`, and so do the states.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax

_DTYPE = "`nn.Linear(2, 3, dtype=jnp.bfloat16, rngs=rngs)`, which computes in it; `param_dtype=jnp.bfloat16` keeps it"

_RATE = (
    "a schedule, `mu.Optimizer(model, optax.adam(optax.linear_schedule(1e-3, 1e-4, 100)))`, or a rate that can be set, "
    "`mu.Optimizer(model, optax.inject_hyperparams(optax.adam)(learning_rate=1e-3))` and then "
    "`optimizer.opt_state = optax.tree.set(optimizer.opt_state, learning_rate=jnp.float32(1e-4))`"
)

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
        "no_grad": "`model(x)`: only `mu.grad` and its relatives differentiate, so there is nothing to switch off",
        "state_dict": '`mu.state(model).to_pure_dict()`; on disk `mu.checkpoint.save("run", model)`',
        "summary": "`print(model)`, or `print(mu.inspect.tabulate(model, x))`",
        "EMA": "mu.optim.EMA(model)",
        "AveragedModel": "mu.optim.EMA(model)",
        "Adam": "mu.Optimizer(model, optax.adam(1e-3))",
        "SGD": "mu.Optimizer(model, optax.sgd(1e-3))",
        "tensor": "jnp.asarray(x)",
        "manual_seed": "mu.Rngs(0)",
        "save": 'mu.checkpoint.save("run", model)',
        "load": 'mu.checkpoint.restore("run", model)',
        "device": "jax.devices()[0]",
        "compile": "mu.jit",
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
        "LogSoftmax": "nn.log_softmax",
        "cross_entropy": "optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()",
        "mse_loss": "jnp.mean((outputs - targets) ** 2)",
        "CrossEntropyLoss": "optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()",
        "BCEWithLogitsLoss": "optax.sigmoid_binary_cross_entropy(logits, targets).mean()",
        "MSELoss": "jnp.mean((outputs - targets) ** 2)",
        "L1Loss": "jnp.mean(jnp.abs(outputs - targets))",
        "functional": "`jax.nn`, or `nn.relu` and the others here",
        "init": "nn.initializers",
        "LSTM": "nn.RNN(nn.LSTMCell(8, 16, rngs=rngs))",
        "GRU": "nn.RNN(nn.GRUCell(8, 16, rngs=rngs))",
        "MultiheadAttention": "nn.MultiHeadAttention",
    },
    "mutatis.optim": {
        **{
            name: f"mu.Optimizer(model, optax.{rule}(1e-3))"
            for name, rule in (
                ("Adam", "adam"),
                ("AdamW", "adamw"),
                ("SGD", "sgd"),
                ("RMSprop", "rmsprop"),
                ("Adagrad", "adagrad"),
            )
        },
        "lr_scheduler": "mu.Optimizer(model, optax.adam(optax.cosine_decay_schedule(1e-3, 1000)))",
    },
    "Module": {
        "parameters": "mu.state(model, mu.Param)",
        "named_parameters": "mu.variables(model, mu.Param)",
        "buffers": "mu.state(model, mu.Buffer)",
        "named_buffers": "mu.variables(model, mu.Buffer)",
        "children": "mu.modules(model)",
        "named_children": "mu.modules(model)",
        "named_modules": "mu.modules(model)",
        "state_dict": '`mu.state(model).to_pure_dict()`; on disk `mu.checkpoint.save("run", model)`',
        "load_state_dict": '`mu.update(model, state)`; from disk `mu.checkpoint.restore("run", model)`',
        "to": f"`mu.sharding.place(model, jax.devices()[0])` for a device; for a dtype, {_DTYPE}",
        "half": _DTYPE,
        "bfloat16": _DTYPE,
        "astype": _DTYPE,
        "weight": "`layer.kernel`, of shape (inputs, outputs); of a norm `layer.scale`",
        "cuda": "`mu.sharding.place(model, jax.devices()[0])`; states are made on the first accelerator as it is",
        "cpu": 'mu.sharding.place(model, jax.devices("cpu")[0])',
        "requires_grad_": "`mu.freeze(model)`, and `mu.thaw(model)` to train it again",
        "zero_grad": "`grads = mu.grad(loss_fn)(model, x)`: gradients are values, made anew each time",
        "forward": "`model(x)`: what a module does is its `__call__`",
        "register_buffer": "`self.table = x`: an array that is assigned is a buffer",
        "register_parameter": "self.w = mu.Param(x)",
        "add_module": "self.layer = layer",
        "fit": "`mu.jit` of a step that calls `optimizer.update(mu.grad(loss_fn)(model, x))`, in a loop of your own",
    },
    "Optimizer": {
        "zero_grad": "`optimizer.update(mu.grad(loss_fn)(model, x))`: gradients are values, made anew each time",
        "param_groups": "`optimizer.opt_state`, where `optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)` keeps its rate",
        "minimize": "optimizer.update(mu.grad(loss_fn)(model, x))",
        "apply_gradients": "optimizer.update(grads)",
        "apply_updates": "optimizer.update(grads)",
        "target": "the model itself: `optimizer.update(grads)` writes to it",
        "lr": _RATE,
        "learning_rate": _RATE,
        "step_size": _RATE,
    },
    "jax.Array": {
        "backward": "`mu.grad(loss_fn)(model, x)`, which differentiates the function that computes the loss",
        "grad": "mu.grad(loss_fn)(model, x)",
        "requires_grad": "`mu.Param(x)`: what is differentiated is said where the gradient is taken",
        "requires_grad_": "`mu.Param(x)`: what is differentiated is said where the gradient is taken",
        "detach": "jax.lax.stop_gradient(x)",
        "numpy": "np.asarray(x)",
        "cpu": 'jax.device_put(x, jax.devices("cpu")[0])',
        "cuda": "`jax.device_put(x, jax.devices()[0])`; arrays are made on the first accelerator as it is",
        "to": "`jax.device_put(x, jax.devices()[0])` for a device, `x.astype(jnp.float32)` for a dtype",
        "float": "x.astype(jnp.float32)",
        "half": "x.astype(jnp.float16)",
        "long": "x.astype(jnp.int32)",
        "unsqueeze": "jnp.expand_dims(x, 0)",
        "permute": "jnp.transpose(x, (1, 0))",
        "contiguous": "x",
        "dim": "x.ndim",
        "numel": "x.size",
        "zero_": "jnp.zeros_like(x)",
        "add_": "x + 1",
        "mul_": "x * 2",
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
        return AttributeError(f"{text}: write {quoted(instead)}")
    return AttributeError(text)  # Python itself suggests a near one


def missing_attribute(place: str, owner: str, name: str, *, of_class: bool = False) -> AttributeError:
    """The error for a name that an object of ours, or its class, does not have, as `missing`."""
    text = (
        f"type object {owner!r} has no attribute {name!r}"
        if of_class
        else f"{owner!r} object has no attribute {name!r}"
    )
    instead = equivalent(place, name)
    return AttributeError(text if instead is None else f"{text}: write {quoted(instead)}")


def quoted(instead: str) -> str:
    """What is written instead, as messages show it: code, or a sentence with code in it."""
    return instead if "`" in instead else f"`{instead}`"
