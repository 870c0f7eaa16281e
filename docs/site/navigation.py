"""What the documentation site consists of: its pages in their order, and the place of every public name.

Nothing here needs more than Python, so that `tests/whole/test_site.py` can hold it in `make test`.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "mutatis"
DOCS = ROOT / "docs"
REPOSITORY = "https://github.com/mutatis/mutatis"
ADDRESS = "https://mutatis.readthedocs.io"

# Files of the repository that are pages of the site, by the page.
FROM_ROOT = {"project/changelog.md": "CHANGELOG.md", "project/contributing.md": "CONTRIBUTING.md"}

Nav: TypeAlias = "list[str | tuple[str, Nav]]"

# The pages in their order. Those that do not exist are left out; `*` is every page of the folder that is not named.
NAV: Nav = [
    "index.md",
    "install.md",
    (
        "Learn",
        [
            "learn/first_model.md",
            "learn/mental_model.md",
            "learn/kinds.md",
            "learn/transforms.md",
            "learn/training.md",
            "learn/layers.md",
            "learn/*",
        ],
    ),
    (
        "How to",
        [
            "howto/index.md",
            (
                "Train",
                [
                    "training.md",
                    "howto/learning_rate.md",
                    "howto/clipping.md",
                    "howto/accumulation.md",
                    "howto/averages.md",
                    "howto/freezing.md",
                    "howto/mixed_precision.md",
                    "howto/counting.md",
                    "howto/metrics.md",
                ],
            ),
            ("Scale and save", ["howto/devices.md", "scaling.md", "howto/checkpoints.md", "reliability.md"]),
            ("Look inside", ["howto/debugging_nan.md", "howto/profiling.md", "howto/recompilation.md"]),
            (
                "Build",
                [
                    "howto/ensembles.md",
                    "howto/recurrent.md",
                    "howto/kv_cache.md",
                    "howto/solvers.md",
                    "solvers.md",
                    "howto/recording.md",
                    "spiking.md",
                ],
            ),
            ("Ship", ["howto/exporting.md", "howto/testing.md", "howto/notebooks.md", "howto/*"]),
        ],
    ),
    (
        "Coming from",
        [
            "coming_from/pytorch.md",
            "coming_from/nnx.md",
            "coming_from/linen.md",
            "coming_from/equinox.md",
            "coming_from/brainstate.md",
            "coming_from/penzai.md",
            "coming_from/jax.md",
            "coming_from/*",
        ],
    ),
    (
        "Concepts",
        [
            "semantics.md",
            "transactions.md",
            "functional.md",
            "how_it_works.md",
            "typing.md",
            "concepts/threads.md",
            "concepts/*",
            "when_not.md",
            "faq.md",
            "glossary.md",
        ],
    ),
    ("Errors", ["errors/index.md", "errors/*"]),
    ("Performance", ["advice.md", "performance.md", "benchmarks.md"]),
    ("Examples", ["examples/index.md", "examples/*"]),
    ("API", ["api/index.md", "api/*"]),
    (
        "Project",
        [
            "project/changelog.md",
            "project/stability.md",
            "project/contributing.md",
            "project/citing.md",
            "project/*",
        ],
    ),
]


@dataclasses.dataclass(frozen=True)
class Group:
    """Some names of a page of the API.

    Attributes:
      title: the heading above them.
      names: public names, full: ``"mutatis.State"``. ``"mutatis.nn.*"`` are all of a module that stand nowhere else.
    """

    title: str
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Page:
    """A page of the API.

    Attributes:
      file: below ``api/``, without the ending.
      title: its title.
      about: Markdown below the title.
      groups: its names. A module among them is shown by its docstring.
    """

    file: str
    title: str
    about: str
    groups: tuple[Group, ...]


def _group(title: str, names: str, module: str = "mutatis") -> Group:
    return Group(title, tuple(f"{module}.{name}" for name in names.split()))


_JAX_NN = (
    "Activations are those of `jax.nn` (`nn.relu`, `nn.gelu`, `nn.softmax` and the others), and initializers those of "
    "`jax.nn.initializers`, as `nn.initializers`: see the [documentation of JAX]"
    "(https://docs.jax.dev/en/latest/jax.nn.html)."
)

# The pages of the API, by task. Every public name stands here exactly once.
PAGES: tuple[Page, ...] = (
    Page(
        "cells",
        "Cells, kinds and modules",
        "A state is a *cell* that holds one value; its *kind* says what it is for. Modules hold cells.",
        (
            _group("Cells", "Variable"),
            _group(
                "Kinds",
                "Param BatchStat Buffer Cache Hidden Intermediate MetricState OptState Perturbation RngState",
            ),
            _group("Modules", "Module static Context"),
        ),
    ),
    Page(
        "state",
        "State and filters",
        "The state of a model as a typed mapping, the filters that select a part of it, and what can be done with it.",
        (
            _group("The state of a model", "State state variables graphdef GraphDef split merge update pop"),
            _group("Filters", "Filter All Any Not Everything Nothing OfType PathContains WithTag"),
            _group("Whole models", "clone snapshot reset freeze thaw rename modules replace view"),
            _group("Transactions and checks", "transaction on_commit error_if"),
        ),
    ),
    Page(
        "transforms",
        "Transforms",
        "The transforms of JAX for functions that read and write state. Each has the parameters of the original under "
        "the same names. [Semantics](../semantics.md) says what each means for state.",
        (
            _group("Compile", "jit eval_shape make_jaxpr"),
            _group(
                "Differentiate", "grad value_and_grad jvp vjp linearize jacfwd jacrev hessian custom_jvp custom_vjp"
            ),
            _group("Map and split", "vmap shard_map StateAxes StateSharding Carry Shared"),
            _group("Loop", "scan for_loop while_loop fori_loop map"),
            _group("Branch", "cond switch"),
            _group("Trade memory for time", "remat accumulate"),
        ),
    ),
    Page(
        "random",
        "Randomness",
        "Random numbers come from streams that a model holds. Nothing is global.",
        (_group("Streams", "Rngs reseed"),),
    ),
    Page(
        "optimizer",
        "Optimizer",
        "Any optax transformation over the states of a model.",
        (_group("Optimizer", "Optimizer"), _group("Averages of parameters", "optim optim.*")),
    ),
    Page(
        "layers",
        "Layers",
        _JAX_NN,
        (
            _group("The module", "nn"),
            _group("Maps", "Linear LinearGeneral Einsum Conv ConvTranspose Embed", "mutatis.nn"),
            _group(
                "Normalization",
                "BatchNorm LayerNorm RMSNorm GroupNorm InstanceNorm SpectralNorm WeightNorm",
                "mutatis.nn",
            ),
            _group(
                "Pooling",
                "avg_pool max_pool min_pool pool AdaptiveAvgPool AdaptiveMaxPool adaptive_avg_pool adaptive_max_pool",
                "mutatis.nn",
            ),
            _group("Dropout and activation", "Dropout PReLU", "mutatis.nn"),
            _group("Containers", "Sequential Stack", "mutatis.nn"),
            _group("More", "*", "mutatis.nn"),
        ),
    ),
    Page(
        "attention",
        "Attention and caches",
        "Attention, positions and masks, and the caches that decoding reads and writes.",
        (
            _group(
                "Attention",
                "MultiHeadAttention dot_product_attention dot_product_attention_weights dot_product_attention_with_rope",
                "mutatis.nn",
            ),
            _group("Positions", "RoPE LearnedPositions SinusoidalPositions", "mutatis.nn"),
            _group("Masks", "make_attention_mask make_causal_mask combine_masks", "mutatis.nn"),
            _group("Caches", "KVCache SlotCache kv_caches", "mutatis.nn"),
            _group("Adapters", "LoRA LoRALinear LoRALinearGeneral LoRAParam adapters_off", "mutatis.nn"),
        ),
    ),
    Page(
        "recurrent",
        "Recurrent layers",
        "Cells, and what runs them over a sequence. What they remember is a state of the model, or handed around.",
        (
            _group("Cells", "RNNCellBase SimpleCell LSTMCell OptimizedLSTMCell GRUCell", "mutatis.nn"),
            _group("Sequences", "RNN Bidirectional flip_sequences", "mutatis.nn"),
        ),
    ),
    Page(
        "spiking",
        "Layers in time",
        "Neurons, synapses, connections, delays and encoders. [Time](../spiking.md) shows them at work.",
        (
            _group("Neurons", "Neuron LIF ALIF LI Izhikevich HodgkinHuxley", "mutatis.nn"),
            _group("Synapses", "Expon Alpha DualExpon STP", "mutatis.nn"),
            _group("Connections and delays", "Connection OneToOne FixedNum FixedProb Sparse Delay", "mutatis.nn"),
            _group("Encoders", "Poisson latency", "mutatis.nn"),
            _group("Integration", "dt exp_euler rk4", "mutatis.nn"),
        ),
    ),
    Page("surrogate", "Surrogate gradients", "", (_group("Functions", "surrogate surrogate.*"),)),
    Page("metrics", "Losses and metrics", "", (_group("Metrics", "metrics metrics.*"),)),
    Page(
        "interventions",
        "Interventions",
        "Look into a model, and change what its layers do, without editing it.",
        (_group("Interventions", "capture intercept sow perturb collect"),),
    ),
    Page("recording", "Recording", "", (_group("Records", "recording recording.*"),)),
    Page(
        "inspect",
        "Inspection",
        "",
        (
            _group("The module", "inspect"),
            _group("A model", "tree count state_table tabulate page", "mutatis.inspect"),
            _group("A function", "explain ledger find_nonfinite", "mutatis.inspect"),
            _group("States over time", "watch history plot", "mutatis.inspect"),
            _group("More", "*", "mutatis.inspect"),
        ),
    ),
    Page(
        "checkpoint",
        "Checkpoints",
        "",
        (
            _group("The module", "checkpoint"),
            _group("Save and restore", "save restore load describe Manager", "mutatis.checkpoint"),
            _group("Ends of jobs", "preemption"),
            _group("More", "*", "mutatis.checkpoint"),
        ),
    ),
    Page("sharding", "Sharding", "", (_group("Sharding", "sharding sharding.*"),)),
    Page(
        "functional",
        "Pure functions",
        "From models to pure functions, and back. [Pure functions of a model](../functional.md) compares the ways.",
        (_group("Pure functions", "functionalize"), _group("As in Flax Linen", "functional functional.*")),
    ),
    Page("effects", "Effects", "", (_group("Effects", "effects effects.*"),)),
    Page("interop", "Other libraries", "", (_group("Interop", "interop interop.*"),)),
    Page("export", "Exported programs", "", (_group("Export", "export load_program LoadedProgram"),)),
    Page(
        "errors",
        "Errors",
        "Every error says what went wrong, where, and what to write instead.",
        (
            _group("Base class", "MutatisError CapturedStateWarning"),
            _group("Errors and warnings", "errors errors.*"),
        ),
    ),
)

# The root, and the modules that users import by name.
MODULES = (
    "mutatis",
    "mutatis.errors",
    "mutatis.nn",
    "mutatis.optim",
    "mutatis.metrics",
    "mutatis.functional",
    "mutatis.effects",
    "mutatis.checkpoint",
    "mutatis.inspect",
    "mutatis.interop",
    "mutatis.sharding",
    "mutatis.surrogate",
    "mutatis.recording",
)

# Objects that have a second public name: that name, and the one under which they are shown.
ALSO = {
    "mutatis.errors.MutatisError": "mutatis.MutatisError",
    "mutatis.errors.CapturedStateWarning": "mutatis.CapturedStateWarning",
    "mutatis.checkpoint.preemption": "mutatis.preemption",
    "mutatis.optim.Optimizer": "mutatis.Optimizer",
    "mutatis.effects.rename": "mutatis.rename",
    "mutatis.effects.thaw": "mutatis.thaw",
}

# Functions of JAX that have a counterpart here: the same, for functions with state. `remat` is `jax.checkpoint`.
_JAX = """
    jax.jit jax.eval_shape jax.make_jaxpr jax.grad jax.value_and_grad jax.jvp jax.vjp jax.linearize jax.jacfwd jax.jacrev
    jax.hessian jax.custom_jvp jax.custom_vjp jax.vmap jax.shard_map
    jax.lax.scan jax.lax.while_loop jax.lax.fori_loop jax.lax.map jax.lax.cond jax.lax.switch
"""
COUNTERPARTS = {f"mutatis.{name.rpartition('.')[2]}": name for name in _JAX.split()}
COUNTERPARTS |= {"mutatis.remat": "jax.checkpoint", "mutatis.nn.dot_product_attention": "jax.nn.dot_product_attention"}


def module_file(module: str) -> Path:
    """The file of a module of the package."""
    path = SOURCE.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def names_of(module: str) -> list[str]:
    """The public names of a module: those of `__all__` and what a star leaves out; without, what stands in its file."""
    tree = ast.parse(module_file(module).read_text(encoding="utf-8"))
    lists = {
        ast.unparse(node.targets[0]): node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in {"__all__", "_NOT_BY_STAR"}
    }
    if "__all__" in lists:
        return [name for value in lists.values() for name in ast.literal_eval(value)]
    kinds = ast.ClassDef | ast.FunctionDef
    found = [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    return list(dict.fromkeys(found))  # overloads stand more than once


def public_names() -> set[str]:
    """Every public name, in full."""
    return {f"{module}.{name}" for module in MODULES for name in names_of(module)}


def places() -> dict[Page, list[tuple[Group, list[str]]]]:
    """The names that each group of each page has, with those that a ``*`` stands for."""
    named = {name for page in PAGES for group in page.groups for name in group.names} | ALSO.keys()

    def expand(name: str) -> list[str]:
        if not name.endswith(".*"):
            return [name]
        module = name.removesuffix(".*")
        return [full for other in names_of(module) if (full := f"{module}.{other}") not in named]

    return {
        page: [(group, [full for name in group.names for full in expand(name)]) for group in page.groups]
        for page in PAGES
    }


def shown_names() -> list[str]:
    """The names that the pages of the API show, in their order."""
    return [name for groups in places().values() for _, names in groups for name in names]


def examples() -> list[Path]:
    """The scripts of `examples/`."""
    return sorted((ROOT / "examples").glob("*.py"))


def generated_pages() -> list[str]:
    """The pages that have no Markdown file of their own."""
    return [
        *(page for page, file in FROM_ROOT.items() if (ROOT / file).exists()),
        "examples/index.md",
        *(f"examples/{path.stem}.md" for path in examples()),
        "api/index.md",
        *(f"api/{page.file}.md" for page in PAGES),
    ]


def existing_pages() -> list[str]:
    """All pages of the site, by their paths below `docs/`."""
    written = [path.relative_to(DOCS).as_posix() for path in sorted(DOCS.rglob("*.md"))]
    index = [] if "index.md" in written else ["index.md"]  # README.md takes its place
    return [*index, *written, *generated_pages()]


def navigation() -> Nav:
    """`NAV` with the pages that there are."""
    pages = existing_pages()

    def named(nav: Nav) -> Iterator[str]:
        for entry in nav:
            if isinstance(entry, str):
                yield entry
            else:
                yield from named(entry[1])

    explicit = set(named(NAV))

    def fill(nav: Nav) -> Nav:
        filled: Nav = []
        for entry in nav:
            if not isinstance(entry, str):
                inner = fill(entry[1])
                if inner:
                    filled.append((entry[0], inner))
            elif entry.endswith("/*"):
                folder = entry.removesuffix("*")
                filled.extend(page for page in pages if page.startswith(folder) and page not in explicit)
            elif entry in pages:
                filled.append(entry)
        return filled

    return fill(NAV)


def flat(nav: Nav) -> list[str]:
    """The pages of a navigation, in their order."""
    return [page for entry in nav for page in ([entry] if isinstance(entry, str) else flat(entry[1]))]
