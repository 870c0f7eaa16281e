"""Random programs over random models, beside the same programs threaded by hand through plain JAX.

One integer makes a case: a model (nested modules, ties, cycles, containers, several kinds, random streams), a program (a
small syntax tree of writes, draws, branches, loops and transformed calls) and a stack of transforms around it. The case
is written out as Python source that uses Mutatis as a user would, and run; an interpreter of the same tree that knows
nothing of Mutatis and hands a dictionary of values around says what should come out: results, gradients and all states.

`check(seed)` runs one case again, `print(source(make_case(seed)))` shows it, and `shrink(case, fails)` makes it smaller.
`MUTATIS_PROGRAMS=5000 pytest -m slow tests/whole/test_random_programs.py` runs that many fresh ones.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import linecache
import os
import random
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mutatis as mu

pytestmark = pytest.mark.once

F = np.float32
LANES = 3  # of every `vmap`, and the number of stacked layers
THRESHOLD = 0.1234

Node = tuple[Any, ...]  # a node of the syntax tree: its name, then its parts
Block = tuple[Node, ...]
Values = dict[str, Any]


# -- the model ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CellSpec:
    """One state: its kind, its type (`S` scalar, `V` of two, `I` counter, `T` tree, `R` stream) and where it is."""

    name: str
    kind: str
    type: str
    places: tuple[str, ...]  # as Python: "m.sub1.cells[0]"; for a stream, those of its `Rngs`
    stack: tuple[int, ...] = ()  # the axes that ensembles give it, outermost first: 0 or -1
    frozen: bool = False
    layer: bool = False

    @property
    def stream(self) -> str:
        """The name of a stream among those of its `Rngs`."""
        return "noise" if self.name == "r1" else "default"


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, a program and the transforms around it, outermost first."""

    cells: tuple[CellSpec, ...]
    layout: tuple[str, ...]  # the lines that build the modules
    program: Block
    wrappers: tuple[Node, ...]
    calls: int = 2
    watched: bool = True  # look at the states after each call (which makes them exposed), or only at the end
    bomb: bool = False  # raise in the middle of one more call
    twins: bool = False  # call it with two models in turn
    weak: bool = False  # the argument is a Python number
    abstract: bool = False  # evaluate it abstractly too, which may not change anything
    seed: int = 0

    def cell(self, name: str) -> CellSpec:
        return next(cell for cell in self.cells if cell.name == name)


def start_of(cell: CellSpec, model: int = 0) -> Any:
    """The value that a state starts with, as NumPy arrays (a stream: a JAX key); `model` tells twins apart."""
    numbers = np.random.RandomState(sum(map(ord, cell.name)) * 7 + model)

    def full(*shape: int) -> tuple[int, ...]:
        shape = (LANES, *shape) if cell.layer else shape
        for axis in reversed(cell.stack):
            shape = (LANES, *shape) if axis == 0 else (*shape, LANES)
        return shape

    def array(*shape: int) -> Any:
        return np.round(numbers.uniform(-1, 1, full(*shape)), 3).astype(F)

    if cell.type == "I":
        return numbers.randint(0, 5, full()).astype(np.int32)
    if cell.type == "R":
        key = jax.random.key(int(numbers.randint(100)))
        return {"key": jax.random.split(key, full()) if full() else key, "count": jnp.zeros(full(), "uint32")}
    return {"S": lambda: array(), "V": lambda: array(2), "T": lambda: {"a": array(), "b": array(2)}}[cell.type]()


def make_model(draw: random.Random) -> tuple[list[CellSpec], list[str]]:  # noqa: C901
    """Random states in a random tree of modules."""
    lines: list[str] = []
    paths: list[list[str]] = [["m"]]
    for number in range(1, draw.randint(1, 4)):
        parent = draw.choice(paths)[0]
        form = draw.choice(["attr", "list", "dict"])
        place = {"attr": f"{parent}.sub{number}", "list": f"{parent}.subs[-1]", "dict": f"{parent}.named['{number}']"}[
            form
        ]
        if form == "list":
            lines += [f"{parent}.subs = [*getattr({parent}, 'subs', []), Node()]"]
            count = sum(line.startswith(f"{parent}.subs = ") for line in lines)
            place = f"{parent}.subs[{count - 1}]"
        elif form == "dict":
            lines += [f"{parent}.named = {{**getattr({parent}, 'named', {{}}), '{number}': Node()}}"]
        else:
            lines += [f"{place} = Node()"]
        paths.append([place])
    if draw.random() < 0.3:
        holder, target = draw.choice(paths), draw.choice(paths)
        lines.append(f"{holder[0]}.alias = {target[0]}")
        target.append(f"{holder[0]}.alias")

    lists: dict[str, int] = {}
    attached: list[str] = []

    def attach(name: str, plain: bool = False) -> str:
        """Another place for a state."""
        module = draw.choice(paths)[0]
        form = "attr" if plain else draw.choice(["attr", "attr", "list", "dict"])
        if form == "list":
            index = lists[module] = lists.get(module, -1) + 1
            attached.append(f"{module}.cells = [*getattr({module}, 'cells', []), {name}]")
            return f"{module}.cells[{index}]"
        if form == "dict":
            attached.append(f"{module}.table = {{**getattr({module}, 'table', {{}}), '{name}': {name}}}")
            return f"{module}.table['{name}']"
        attached.append(f"{module}.{name} = {name}")
        return f"{module}.{name}"

    def places(name: str, plain: bool = False) -> tuple[str, ...]:
        own = [attach(name, plain)]
        if draw.random() < 0.25 and not plain:
            own.append(attach(name))
        for names in paths:
            own += [
                alias + path[len(names[0]) :] for alias in names[1:] for path in own if path.startswith(names[0] + ".")
            ]
        return tuple(dict.fromkeys(own))

    floats = ["Param", "BatchStat", "Cache", "Hidden", "Variable"]
    cells = [
        CellSpec("p0", "Param", draw.choice("SV"), places("p0")),
        CellSpec("n0", draw.choice(["Variable", "Cache", "BatchStat"]), "I", places("n0")),
    ]
    for number in range(draw.randint(1, 4)):
        name, kind = f"f{number}", draw.choice(floats)
        cells.append(CellSpec(name, kind, draw.choice("SSVVT"), places(name), frozen=draw.random() < 0.06))
    if draw.random() < 0.3:
        cells.append(CellSpec("n1", "Variable", "I", places("n1")))
    if draw.random() < 0.4:
        cells.append(CellSpec("b0", "Buffer", draw.choice("SV"), places("b0", plain=True)))
    if draw.random() < 0.75:
        rngs = places("rngs")
        cells.append(CellSpec("r0", "RngState", "R", rngs))
        if draw.random() < 0.3:
            cells.append(CellSpec("r1", "RngState", "R", rngs))
    if draw.random() < 0.35:
        lines.append("m.layers = Node()")
        for name, kind, type in [("lw", "Param", "V"), ("lh", "Hidden", "S"), ("ln", "Variable", "I")]:
            cells.append(CellSpec(name, kind, type, (f"m.layers.{name}",), layer=True))
            lines.append(f"m.layers.{name} = {name}")
    return cells, ["m.flag = 'a'", *lines, *attached]


# -- programs ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scope:
    """What may be said at a place of a program.

    Args:
      lane: inside a `vmap` that shares states, so what is written must be the same in all lanes.
      writes: whether states may be written at all.
      backward: whether a reverse derivative is taken around, which `while_loop` has not.
      layers: whether the states of layers are sliced here: "" (no), "scan" or "vmap".
      outer_lane: whether a shared `vmap` is around the layers too.
      lanes: whether a mean over the lanes of the innermost `vmap` is the same in all lanes of all.
      grows: whether states may be made: not in loops, branches, and lanes.
      local: inside a function of a copy of the model.
      alike: whether draws are the same in all lanes, and so may not be in a branch.
      xs: how many arguments are in reach.
    """

    lane: bool = False
    writes: bool = True
    backward: bool = False
    layers: str = ""
    outer_lane: bool = False
    lanes: bool = False
    grows: bool = True
    local: bool = False
    alike: bool = False
    draws: bool = True
    xs: int = 1
    depth: int = 0


def walk(node: Any, but: str = "") -> Iterator[Node]:
    """All nodes of a tree, without what is inside those named `but`."""
    if isinstance(node, tuple) and (not node or node[0] != but):
        if node and isinstance(node[0], str):
            yield node
        for part in node:
            yield from walk(part, but)


def contains(node: Any, *names: str) -> bool:
    return any(inner[0] in names for inner in walk(node))


class Writer:
    """Draws programs."""

    def __init__(self, draw: random.Random, cells: Sequence[CellSpec], readonly: frozenset[str], budget: int) -> None:
        self.draw = draw
        self.cells = cells
        self.readonly = readonly
        self.budget = budget

    def pick(self, scope: Scope, types: str, free: bool = False) -> list[CellSpec]:
        """The states of some types that are in reach; `free`: that are the same in all lanes."""
        layers = bool(scope.layers) and not (free and scope.layers == "vmap")
        types = types.replace("R", "") if not scope.draws else types
        return [cell for cell in self.cells if cell.type in types and (layers or not cell.layer)]

    def number(self, most: int) -> int:
        return self.draw.randint(0, most)

    def place(self, cell: CellSpec) -> int:
        return self.number(len(cell.places) - 1)

    def scalar(self, scope: Scope, free: bool = False, depth: int = 2) -> Node:
        """A scalar; `free`: one that is the same in all lanes."""
        options: list[Callable[[], Node]] = [lambda: ("const", self.draw.choice([0.5, -0.25, 1.0, 0.0, 2.0, -1.0]))]
        if not free:
            options += [lambda: ("x", self.number(scope.xs - 1)), lambda: ("acc",)] * 2
        if cells := self.pick(scope, "S", free):
            options += [lambda: self.read(self.draw.choice(cells))] * 3
        if trees := self.pick(scope, "T", free):
            options += [lambda: self.part(self.draw.choice(trees), "a")] * 2
        if counters := self.pick(scope, "I", free):
            options += [lambda: self.read(self.draw.choice(counters))]
        if (streams := self.pick(scope, "R")) and not free:
            options += [lambda: self.sample(self.draw.choice(streams), "S")] * 2
        if scope.lanes and depth:
            options += [lambda: ("mean", self.scalar(dataclasses.replace(scope, lanes=False), False, depth - 1))] * 2
        if depth:
            options += [
                lambda: ("un", self.draw.choice(["tanh", "sin", "cos"]), self.scalar(scope, free, depth - 1)),
                lambda: self.binary(self.scalar, scope, free, depth),
                lambda: self.binary(self.scalar, scope, free, depth),
                lambda: ("sum", self.vector(scope, free, depth - 1)),
                lambda: ("at", self.vector(scope, free, depth - 1), self.index(scope, free)),
                lambda: (
                    "where",
                    self.predicate(scope, free, depth - 1),
                    self.scalar(scope, free, depth - 1),
                    self.scalar(scope, free, depth - 1),
                ),
            ]
        return self.draw.choice(options)()

    def vector(self, scope: Scope, free: bool = False, depth: int = 2) -> Node:
        """A vector of two."""
        options: list[Callable[[], Node]] = [lambda: ("pair", (0.5, self.draw.choice([-0.5, 0.75])))]
        if cells := self.pick(scope, "V", free):
            options += [lambda: self.read(self.draw.choice(cells))] * 3
        if trees := self.pick(scope, "T", free):
            options += [lambda: self.part(self.draw.choice(trees), "b")] * 2
        if (streams := self.pick(scope, "R")) and not free:
            options += [lambda: self.sample(self.draw.choice(streams), "V")]
        if depth:
            options += [
                lambda: ("un", self.draw.choice(["tanh", "sin", "cos"]), self.vector(scope, free, depth - 1)),
                lambda: self.binary(self.vector, scope, free, depth),
                lambda: ("spread", self.scalar(scope, free, depth - 1)),
                lambda: ("flip", self.vector(scope, free, depth - 1)),
                lambda: ("stack", self.scalar(scope, free, depth - 1), self.scalar(scope, free, depth - 1)),
            ]
        return self.draw.choice(options)()

    def of_type(self, type: str, scope: Scope, free: bool) -> Node:
        return self.scalar(scope, free) if type == "S" else self.vector(scope, free)

    def binary(self, of: Callable[..., Node], scope: Scope, free: bool, depth: int) -> Node:
        return ("bin", self.draw.choice("+-*"), of(scope, free, depth - 1), of(scope, free, depth - 1))

    def read(self, cell: CellSpec) -> Node:
        return ("read", cell.name, self.place(cell), self.number(3))

    def part(self, cell: CellSpec, key: str) -> Node:
        return ("part", cell.name, self.place(cell), self.number(1), key)

    def sample(self, cell: CellSpec, type: str) -> Node:
        return ("draw", cell.name, self.place(cell), type)

    def index(self, scope: Scope, free: bool) -> Any:
        counters = self.pick(scope, "I", free)
        return self.draw.choice([0, 1, -1, ("counter", self.draw.choice(counters).name, 2)])

    def predicate(self, scope: Scope, free: bool, depth: int = 1) -> Node:
        counter = self.draw.choice(self.pick(scope, "I", free))
        return self.draw.choice(
            [
                ("odd", counter.name),
                ("below", counter.name, 1 + self.number(3)),
                ("above", self.scalar(scope, free, depth)),
            ]
        )

    # -- statements

    def block(self, scope: Scope, most: int = 3) -> Block:
        return tuple(self.statement(scope) for _ in range(1 + self.number(most - 1)))

    def statement(self, scope: Scope) -> Node:
        self.budget -= 1
        if scope.grows and self.draw.random() < 0.08:
            return ("born", self.number(1), self.number(4), self.draw.choice(self.pick(scope, "I", free=True)).name)
        if scope.depth < 3 and self.budget > 0 and self.draw.random() < (0.5, 0.4, 0.3)[scope.depth]:
            return self.compound(scope)
        if scope.writes and self.draw.random() < 0.75:
            return self.write(scope)
        return ("acc", self.scalar(scope))

    def write(self, scope: Scope) -> Node:
        cells = [c for c in self.pick(scope, "SVIT") if not c.frozen and c.name not in self.readonly]
        cell = self.draw.choice(cells)
        own = cell.layer and scope.layers == "vmap" and not scope.outer_lane
        free = scope.lane and not own
        # What is shared by the layers may not depend on one; a layer's own state may.
        reads = scope if not (cell.layer and free) else dataclasses.replace(scope, layers="scan")
        place = self.place(cell)
        if cell.type == "I":
            return ("count", cell.name, place, self.number(3), 1 + self.number(2))
        if cell.type == "T":
            key = self.draw.choice("ab")
            return ("tree", cell.name, place, self.number(2), key, self.of_type("SV"["ab".index(key)], reads, free))
        what = self.draw.choice(["set", "set", "aug", "item"] if cell.type == "V" else ["set", "set", "aug"])
        if what == "item":
            return ("item", cell.name, place, self.index(reads, free), self.scalar(reads, free))
        return (what, cell.name, place, self.number(3), self.of_type(cell.type, reads, free))

    def inner(self, scope: Scope, **changes: Any) -> Scope:
        return dataclasses.replace(scope, **{"depth": scope.depth + 1, "grows": False, "lanes": False, **changes})

    def chosen(self, scope: Scope, **changes: Any) -> Scope:
        """Inside a branch."""
        return self.inner(scope, draws=scope.draws and not scope.alike, **changes)

    def branching(self, scope: Scope) -> tuple[bool, Scope]:
        """Whether a predicate is the same in all lanes, and what may be said behind it."""
        free = scope.lane and scope.writes and self.draw.random() < 0.6
        return free, self.chosen(scope, writes=scope.writes and (free or not scope.lane))

    def compound(self, scope: Scope) -> Node:
        options = [
            "cond",
            "cond",
            "switch",
            "for",
            "scan",
            "fori",
            "jit",
            "jit",
            "remat",
            "grad",
            "grad",
            "vmap",
            "map",
        ]
        options += ["static", "local", "jvp"]
        if scope.writes and not scope.layers and not any(c.frozen and c.kind == "Param" for c in self.cells):
            options += ["decay"] if "p0" not in self.readonly else []
        if not scope.backward:
            options.append("while")
        if any(cell.layer for cell in self.cells) and not scope.layers:
            options += ["layers"] * 4
        return getattr(self, f"make_{self.draw.choice(options)}")(scope)  # type: ignore[no-any-return]

    def make_cond(self, scope: Scope) -> Node:
        free, inner = self.branching(scope)
        return ("cond", self.predicate(scope, free), self.number(2), self.block(inner, 2), self.block(inner, 2))

    def make_switch(self, scope: Scope) -> Node:
        counters = self.pick(scope, "I", free=True)
        inner = self.chosen(scope)
        return (
            "switch",
            self.draw.choice(counters).name,
            self.number(1),
            tuple(self.block(inner, 2) for _ in range(2 + self.number(1))),
        )

    def make_for(self, scope: Scope) -> Node:
        return (
            "for",
            self.draw.choice([0, 2, 2, 3]),
            bool(self.number(1)),
            self.block(self.inner(scope, xs=scope.xs + 1)),
        )

    def make_scan(self, scope: Scope) -> Node:
        inner = self.inner(scope, xs=scope.xs + 1)
        return ("scan", self.draw.choice([0, 2, 2, 3]), bool(self.number(1)), self.number(1), self.block(inner))

    def make_fori(self, scope: Scope) -> Node:
        traced = not scope.backward and self.draw.random() < 0.4
        return ("fori", self.number(3), traced, self.block(self.inner(scope, xs=scope.xs + 1)))

    def make_while(self, scope: Scope) -> Node:
        free, inner = self.branching(scope)
        while contains(test := self.predicate(scope, free), "draw"):
            pass
        return ("while", 1 + self.number(2), test, self.block(inner))

    def make_jit(self, scope: Scope) -> Node:
        form = self.number(2 if scope.local else 3)  # 0: closed over, 1 and 2: an argument, 2 and 3: made once
        kept = {"grows": scope.grows, "lanes": scope.lanes}
        inner = self.inner(scope, xs=1 if form >= 2 else scope.xs + 1, **kept)
        return ("jit", form, self.block(inner))

    def make_remat(self, scope: Scope) -> Node:
        kept = {"grows": scope.grows, "lanes": scope.lanes}
        return ("remat", self.number(1), self.block(self.inner(scope, xs=scope.xs + 1, **kept)))

    def make_grad(self, scope: Scope) -> Node:
        wrt = self.draw.choice(["mu.Param", "mu.Param", "mu.Any(mu.Param, mu.Hidden)", "mu.Variable"])
        form = self.draw.choice(["arg", "of", "both"])
        inner = self.inner(scope, xs=scope.xs + 1, backward=True, grows=scope.grows)
        return ("grad", form, wrt, self.block(inner))

    def make_jvp(self, scope: Scope) -> Node:
        frozen = any(cell.frozen and cell.kind == "Param" for cell in self.cells)
        form = self.draw.choice(["x", "of"] if frozen else ["x", "model", "of"])
        return ("jvp", form, self.block(self.inner(scope, xs=scope.xs + 1, grows=scope.grows)))

    def make_static(self, scope: Scope) -> Node:
        inner = self.inner(scope, grows=scope.grows, lanes=scope.lanes)
        return ("static", self.block(inner, 2), self.block(inner, 2))

    def make_local(self, scope: Scope) -> Node:
        return ("local", self.number(1), self.block(self.inner(scope, local=True)))

    def make_decay(self, scope: Scope) -> Node:
        return ("decay", self.number(1))

    def make_vmap(self, scope: Scope) -> Node:
        inner = self.inner(scope, xs=scope.xs + 1, lane=True, outer_lane=True, lanes=not scope.lane)
        return ("vmap", self.number(2), self.block(inner))

    def make_map(self, scope: Scope) -> Node:
        batch = self.number(3)
        lane = scope.lane or batch > 0
        inner = self.inner(scope, xs=scope.xs + 1, lane=lane, outer_lane=lane, writes=scope.writes and not batch)
        return ("map", batch, self.block(inner))

    def make_layers(self, scope: Scope) -> Node:
        form = self.draw.choice(["scan", "scan", "vmap", "states"])
        lanes = form != "scan"
        inner = self.inner(scope, layers="vmap" if lanes else "scan", lane=scope.lane or lanes, outer_lane=scope.lane)
        return ("layers", form, self.block(inner))


def make_case(seed: int) -> Case:
    """The case of a seed."""
    draw = random.Random(seed)
    while meets_known_bug(case := draw_case(draw, seed)):
        pass
    return case


def meets_known_bug(case: Case) -> bool:
    """Whether a case would only find again what an expected failure below says; without those, this can go.

    Draws inside `remat`, or what `functionalize` gives, in the lanes of a `vmap`.
    """
    lanes = False
    for wrapper in case.wrappers:
        if lanes and wrapper[0] in ("remat", "functionalize"):
            break
        lanes |= wrapper[0] in ("vmap", "ensemble")
    else:
        vectorized = [node for node in walk(case.program) if lanes or node[0] in ("vmap", "map", "layers")]
        if not any(contains(node, "remat") for node in vectorized):
            return False
    return any(cell.type == "R" for cell in case.cells)


def draw_case(draw: random.Random, seed: int) -> Case:
    """A model, a program and transforms around it."""
    cells, layout = make_model(draw)
    wrappers: list[Node] = []
    stacks: dict[str, tuple[int, ...]] = {cell.name: () for cell in cells}
    lane = backward = False
    readonly: set[str] = set()
    frozen = any(cell.frozen for cell in cells)
    grows, alike, loops, doubled, split = True, False, 0, 0, 0
    for _ in range(draw.choice([0, 1, 1, 2, 2, 3, 3, 4])):
        options = ["jit", "jit", "grad", "remat", "vmap", "ensemble", "slices", "scan", "for", "fori", "map", "cond"]
        options += ["while"] if not backward else []
        options += ["functionalize"] if not frozen else []
        what = draw.choice(options)
        form = draw.randint(0, 3)
        loops += what in ("scan", "for", "fori", "map", "while", "slices")
        doubled += what == "cond"
        split += what in ("ensemble", "slices")
        if loops > 2 or doubled > 1 or split > 2:
            continue
        grows &= what in ("jit", "grad", "remat")
        lane |= what == "vmap"
        backward |= what == "grad"
        wrapper: Node = (what, form)
        if what == "grad":
            wrapper = (what, form, draw.choice(["arg", "of", "both"]), draw.choice(["mu.Param", "mu.Variable"]))
        elif what in ("ensemble", "slices"):
            others = draw.choice(
                ["", "", "Param", "RngState", "Shared"] if what == "ensemble" else ["", "Param", "RngState"]
            )
            axis = draw.choice([0, 0, -1])
            for cell in cells:
                if cell.kind != ("RngState" if others == "Shared" else others):
                    stacks[cell.name] = (*stacks[cell.name], axis)
                elif what == "ensemble" and others == "Param":
                    readonly.add(cell.name)
            alike |= others == "Shared"
            wrapper = (what, form, others, axis)
        elif what == "vmap":
            alike |= form == 2
        elif what == "cond" and alike:
            continue
        wrappers.append(wrapper)
    made = tuple(dataclasses.replace(cell, stack=stacks[cell.name]) for cell in cells)
    scope = Scope(lane=lane, outer_lane=lane, backward=backward, grows=grows, alike=alike)
    writer = Writer(draw, made, frozenset(readonly), draw.choice([5, 8, 12]))
    program = writer.block(scope, 6)
    if any(node[:2] in (("jit", 3), ("remat", 3)) for node in walk((program, tuple(wrappers)))):
        program = inside_the_model(
            program
        )  # a function that is a static argument is not named: its places are not seen
    return Case(
        made,
        tuple(layout),
        program,
        tuple(wrappers),
        calls=draw.choice([1, 2, 2, 3]),
        watched=draw.random() < 0.5,
        bomb=draw.random() < 0.15,
        twins=draw.random() < 0.25 and not contains(program, "born"),
        weak=draw.random() < 0.3,
        abstract=draw.random() < 0.15,
        seed=seed,
    )


def inside_the_model(tree: Any) -> Any:
    """A program whose new states are all attributes of the model."""
    if not isinstance(tree, tuple):
        return tree
    if tree[:1] == ("born",):
        return (*tree[:2], tree[2] % 3, *tree[3:])
    return tuple(map(inside_the_model, tree))


# -- as Python that uses Mutatis -----------------------------------------------------------------------------------


def squash(tree: Any) -> Any:
    """One bounded number that depends on every array of a result; both sides use it."""
    return jnp.tanh(sum((jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(tree)), F(0)))


def indented(lines: Sequence[str]) -> list[str]:
    return ["    " + line for line in lines]


class Emitter:
    """Writes a case as Python."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.cells = {cell.name: cell for cell in case.cells}
        self.numbers = itertools.count(1)
        self.header: list[str] = []  # functions that are made once, beside the program
        self.outside = not case.wrappers  # whether the statements that are written now run outside every transform

    def place(self, name: str, place: int = 0) -> str:
        cell = self.cells[name]
        return cell.places[place % len(cell.places)]

    # -- expressions

    def expression(self, e: Node, xs: Sequence[str], acc: str, bare: bool = False) -> str:  # noqa: C901
        def sub(e: Node, bare: bool = False) -> str:
            return self.expression(e, xs, acc, bare)

        match e:
            case ("const", value):
                return f"F({value!r})"
            case ("pair", values):
                return f"jnp.array({values!r}, F)"
            case ("x", up):
                return xs[-1 - min(up, len(xs) - 1)]
            case ("acc",):
                return acc
            case ("read", name, place, form):
                return self.read(name, self.place(name, place), form, bare)
            case ("part", name, place, form, key):
                return f"{self.place(name, place)}{('.value', '')[form]}[{key!r}]"
            case ("draw", name, place, type):
                stream = self.place(name, place) + (".noise" if name == "r1" else "")
                return f"jax.random.uniform({stream}(), {'(2,)' if type == 'V' else '()'})"
            case ("un", what, a):
                return f"jnp.{what}({sub(a, True)})"
            case ("bin", what, a, b):
                return f"({sub(a, True)} {what} {sub(b, a[0] != 'const')})"
            case ("sum", a):
                return f"jnp.sum({sub(a, True)})"
            case ("mean", a):
                return f"jax.lax.pmean({sub(a)}, 'lanes')"
            case ("at", a, index):
                return f"{sub(a)}[{self.index(index)}]"
            case ("spread", a):
                return f"jnp.broadcast_to({sub(a)}, (2,))"
            case ("flip", a):
                return f"{sub(a)}[::-1]"
            case ("stack", a, b):
                return f"jnp.stack([{sub(a)}, {sub(b)}])"
            case ("where", test, a, b):
                return f"jnp.where({self.predicate(test, xs, acc)}, {sub(a)}, {sub(b)})"
        raise AssertionError(e)

    def read(self, name: str, place: str, form: int, bare: bool) -> str:
        cell = self.cells[name]
        if cell.kind == "Buffer":
            return place
        if cell.type == "I":
            return f"({place}{('.value', '[...]', '', '.get()')[form]}.astype(F) * F(0.1))"
        return place + (".value", "[...]", "" if bare else ".value", ".get()")[form]

    def index(self, index: Any) -> str:
        return f"{self.place(index[1])}.value % {index[2]}" if isinstance(index, tuple) else str(index)

    def predicate(self, e: Node, xs: Sequence[str], acc: str) -> str:
        match e:
            case ("odd", name):
                return f"({self.place(name)}.value % 2 == 1)"
            case ("below", name, most):
                return f"({self.place(name)} < {most})"
            case ("above", a):
                return f"({self.expression(a, xs, acc, bare=True)} > F({THRESHOLD}))"
        raise AssertionError(e)

    # -- statements

    def block(self, block: Block, xs: Sequence[str], acc: str) -> list[str]:
        lines = ["tick()"] if self.case.bomb else []
        return lines + [line for statement in block for line in self.statement(statement, xs, acc)]

    def statement(self, s: Node, xs: Sequence[str], acc: str) -> list[str]:
        if s[0] in ("set", "aug", "item", "tree", "count"):
            return [self.write(s, xs, acc)]
        if s[0] == "acc":
            return [f"{acc} = jnp.tanh({self.expression(s[1], xs, acc, bare=True)})"]
        if s[0] == "static":  # no function of its own
            first, second = (indented(["pass", *self.block(block, xs, acc)]) for block in s[1:])
            return ["if m.flag == 'a':", *first, "else:", *second]
        outside, self.outside = self.outside, False
        lines: list[str] = getattr(self, f"emit_{s[0]}")(s, xs, acc)
        self.outside = outside
        return lines

    def write(self, s: Node, xs: Sequence[str], acc: str) -> str:
        what, name = s[:2]
        place, cell = self.place(name, s[2]), self.cells[name]
        if what == "count":
            form, k = s[3:]
            return (
                f"{place}.value += {k}",
                f"{place}.value = ({place}.value * 3 + {k}) % 7",
                f"{place} += {k}",
                f"{place}.set({place}.get() + {k})",
            )[form]
        value = f"jnp.tanh({self.expression(s[-1], xs, acc, bare=True)})"
        if what == "tree":
            form, key = s[3:5]
            if form == 1:
                return f"{place}.value = {{**{place}.value, {key!r}: {value}}}"
            inside = form == 2 and not self.outside  # a dict that is read outside is the reader's own
            return f"{place}{'.value' if inside else ''}[{key!r}] = {value}"
        if what == "item":
            index = self.index(s[3])
            return (
                f"{place} = {place}.at[{index}].set({value})"
                if cell.kind == "Buffer"
                else f"{place}[{index}] = {value}"
            )
        form = 2 if cell.kind == "Buffer" else s[3]
        attribute = not place.endswith("]")
        if what == "set":
            return (
                f"{place}.value = {value}",
                f"{place}[...] = {value}",
                f"{place} = {value}" if attribute else f"{place}.set({value})",
                f"{place}.set({value})",
            )[form]
        value = f"F(0.1) * {value}"
        return (
            f"{place}.value += {value}",
            f"{place}[...] += {value}",
            f"{place} += {value}",
            f"{place}.value = {place}.value + {value}",
        )[form]

    def function(
        self, block: Block, xs: Sequence[str], acc: str, takes: str, gives: str = "{acc}", fresh: bool = False
    ) -> tuple[str, list[str]]:
        """A function of what `takes` names (`{x}` and `{acc}` are its own) and its lines; `fresh`: it sees no other `x`."""
        number = next(self.numbers)
        x, inner = f"x{number}", f"acc{number}"
        own_x, own_acc = "{x}" in takes, "{acc}" in takes
        xs = [*([] if fresh else xs), *([x] if own_x else [])]
        body = [] if own_acc else [f"{inner} = {acc}"]
        body += self.block(block, xs, inner)
        body.append("return " + gives.format(acc=inner))
        return f"f{number}", [f"def f{number}({takes.format(x=x, acc=inner)}):", *indented(body)]

    def argument(self, xs: Sequence[str], acc: str) -> str:
        return f"jnp.sin({xs[-1]} + {acc})"

    def items(self, xs: Sequence[str], count: int) -> str:
        return f"{xs[-1]} + F(0.1) * jnp.arange({count}, dtype=F)"

    def emit_cond(self, s: Node, xs: Sequence[str], acc: str) -> list[str]:
        _, test, form, yes, no = s
        takes = ("{acc}", "m, {acc}", "")[form]
        first, lines = self.function(yes, xs, acc, takes)
        second, more = self.function(no, xs, acc, takes)
        operands = "".join(", " + part for part in takes.format(acc=acc).split(", ") if part)
        return [*lines, *more, f"{acc} = mu.cond({self.predicate(test, xs, acc)}, {first}, {second}{operands})"]

    def emit_switch(self, s: Node, xs: Sequence[str], acc: str) -> list[str]:
        _, counter, form, blocks = s
        functions = [self.function(block, xs, acc, "{acc}") for block in blocks]
        index = self.place(counter) + (".value - 1" if form else f".value % {len(blocks)}")
        names = ", ".join(name for name, _ in functions)
        return [*(line for _, lines in functions for line in lines), f"{acc} = mu.switch({index}, [{names}], {acc})"]

    def emit_for(self, s: Node, xs: Sequence[str], acc: str) -> list[str]:
        _, count, reverse, block = s
        name, lines = self.function(block, xs, acc, "{x}")
        return [*lines, f"{acc} = squash(mu.for_loop({name}, {self.items(xs, count)}, reverse={reverse}))"]

    def emit_scan(self, s: Node, xs: Sequence[str], acc: str) -> list[str]:
        _, count, reverse, form, block = s
        name, lines = self.function(block, xs, acc, "{acc}, {x}", "{acc}, jnp.cos({acc})")
        call = f"mu.scan({name}, {acc}, {self.items(xs, count)}, reverse={reverse}, unroll={form + 1})"
        return [*lines, f"{acc}, ys = {call}", f"{acc} = {acc} + F(0.1) * jnp.sum(ys)"]

    def emit_fori(self, s: Node, xs: Sequence[str], acc: str) -> list[str]:
        _, count, traced, block = s
        name, lines = self.function(block, xs, acc, "{x}, {acc}")
        loop = f"lambda i, acc: {name}(i.astype(F) * F(0.3), acc)"
        bounds = f"jnp.int32(0), jnp.int32({count})" if traced else f"0, {count}"
        return [*lines, f"{acc} = mu.fori_loop({bounds}, {loop}, {acc})"]

    def emit_while(self, s: Node, xs: Sequence[str], acc: str) -> list[str]:
        _, most, test, block = s
        name, lines = self.function(block, xs, acc, "{acc}")
        goes_on = f"lambda loop: (loop[0] < {most}) & {self.predicate(test, xs, 'loop[1]')}"
        step = f"lambda loop: (loop[0] + 1, {name}(loop[1]))"
        return [*lines, f"_, {acc} = mu.while_loop({goes_on}, {step}, (jnp.int32(0), {acc}))"]

    def emit_jit(self, s: Node, xs: Sequence[str], acc: str) -> list[str]:
        _, form, block = s
        model = "m, " if form in (1, 2) else ""
        name, lines = self.function(block, xs, acc, model + "{x}, {acc}", fresh=form >= 2)
        jitted = f"mu.jit({name})"
        if form >= 2:
            self.header += [*lines, f"jit_{name} = {jitted}"]
            lines, jitted = [], f"jit_{name}"
        return [*lines, f"{acc} = {jitted}({model}{self.argument(xs, acc)}, {acc})"]

    def emit_remat(self, s: Node, xs: Sequence[str], acc: str) -> list[str]:
        _, form, block = s
        model = "m, " if form else ""
        name, lines = self.function(block, xs, acc, model + "{x}, {acc}")
        return [*lines, f"{acc} = mu.remat({name})({model}{self.argument(xs, acc)}, {acc})"]

    def emit_grad(self, s: Node, xs: Sequence[str], acc: str) -> list[str]:
        _, form, wrt, block = s
        model = "m, " if form == "arg" else ""
        name, lines = self.function(block, xs, acc, model + "{x}, {acc}")
        options = {"arg": "(0, 1)", "of": "of=m", "both": "argnums=0, of=m"}[form]
        call = f"mu.value_and_grad({name}, {options}, wrt={wrt})({model}{self.argument(xs, acc)}, {acc})"
        return [*lines, f"value, gradient = {call}", f"{acc} = jnp.tanh(value + F(0.1) * squash(gradient))"]

    def emit_jvp(self, s: Node, xs: Sequence[str], acc: str) -> list[str]:
        _, form, block = s
        name, lines = self.function(block, xs, acc, ("m, " if form == "model" else "") + "{x}")
        x, tangent = self.argument(xs, acc), "jnp.float32(0.5)"
        if form == "of":  # a derivative of the function as a whole
            return [*lines, f"{acc} = squash(mu.jacfwd({name}, of=m)({x}))"]
        if form == "model":
            ones = "mu.state(m, mu.Param).map(lambda path, v: jax.tree.map(jnp.ones_like, v))"
            x, tangent = f"m, {x}", f"{ones}, {tangent}"
        lines = [*lines, f"value, tangent = mu.jvp({name}, ({x},), ({tangent},))"]
        return [*lines, f"{acc} = jnp.tanh(value + F(0.1) * tangent)"]

    def emit_vmap(self, s: Node, xs: Sequence[str], acc: str) -> list[str]:
        _, form, block = s
        takes = ("{x}", "m, {x}", "{x}, {acc}")[form]
        name, lines = self.function(block, xs, acc, takes)
        axes = ("0", "(None, 0)", "(0, None)")[form]
        args = takes.format(x=self.items(xs, LANES), acc=acc)
        return [*lines, f"{acc} = squash(mu.vmap({name}, in_axes={axes}, axis_name='lanes')({args}))"]

    def emit_map(self, s: Node, xs: Sequence[str], acc: str) -> list[str]:
        _, batch, block = s
        name, lines = self.function(block, xs, acc, "{x}")
        return [*lines, f"{acc} = squash(mu.map({name}, {self.items(xs, LANES)}, batch_size={batch or None}))"]

    def emit_layers(self, s: Node, xs: Sequence[str], acc: str) -> list[str]:
        _, form, block = s
        if form == "scan":
            name, lines = self.function(block, xs, acc, "{acc}, layer", "{acc}, None")
            return [*lines, f"{acc}, _ = mu.scan({name}, {acc}, m.layers)"]
        if form == "vmap":
            name, lines = self.function(block, xs, acc, "layer, {acc}")
            return [*lines, f"{acc} = squash(mu.vmap({name}, in_axes=(0, None))(m.layers, {acc}))"]
        name, lines = self.function(block, xs, acc, "{acc}")
        return [*lines, f"{acc} = squash(mu.vmap({name}, in_axes=None, states=[(m.layers, 0)])({acc}))"]

    def emit_born(self, s: Node, xs: Sequence[str], acc: str) -> list[str]:
        _, number, form, counter = s
        name, value = f"m.new{number}", f"{self.place(counter)}.value + 1"
        if form == 3:  # in a dict that the function names
            name = f"ODD['odd3{number}']"
            return [
                f"if 'odd3{number}' not in ODD:",
                f"    {name} = mu.Cache({value})",
                "else:",
                f"    {name}.value = {value}",
            ]
        if form == 4:  # in a list in an attribute of a plain object that the function names
            name = f"BOX.odd4{number}"
            make = f"    {name} = [mu.Cache({value})]"
            return [f"if not hasattr(BOX, 'odd4{number}'):", make, "else:", f"    {name}[0].value = {value}"]
        if form == 2:  # the first that is kept, and a static
            return [f"m.note{number} = 'seen'", f"if not hasattr(m, 'new{number}'):", f"    {name} = mu.Cache({value})"]
        if form == 1:  # another cell each time
            return [f"{name} = mu.Cache({value})"]
        return [f"if hasattr(m, 'new{number}'):", f"    {name} = {value}", "else:", f"    {name} = mu.Cache({value})"]

    def emit_local(self, s: Node, xs: Sequence[str], acc: str) -> list[str]:
        name, lines = self.function(s[2], xs, acc, "m, {acc}")
        return [*lines, f"{acc} = {name}({('mu.clone(m)', 'mu.merge(*mu.split(m))')[s[1]]}, {acc})"]

    def emit_decay(self, s: Node, xs: Sequence[str], acc: str) -> list[str]:
        smaller = "mu.state(m, mu.Param).map(lambda path, v: jax.tree.map(lambda a: a * F(0.9), v))"
        return [f"mu.update(m, {smaller}{('', '.to_pure_dict()')[s[1]]})"]

    # -- the whole

    def build(self) -> list[str]:
        lines = ["m = Node()"]
        made = set()
        for cell in self.case.cells:
            if cell.type == "R":
                if cell.places not in made:
                    made.add(cell.places)
                    seeds = "".join(f", {other.stream}=0" for other in self.case.cells if other.type == "R")
                    lines.append(f"rngs = mu.Rngs({seeds[2:]})")
                lines.append(f"rngs.streams[{cell.stream!r}].value = start[{cell.name!r}]")
            elif cell.kind == "Buffer":
                lines.append(f"{cell.name} = jnp.asarray(start[{cell.name!r}])")
            else:
                lines.append(f"{cell.name} = mu.{cell.kind}(start[{cell.name!r}])")
        lines += self.case.layout
        lines += [f"mu.freeze({cell.name})" for cell in self.case.cells if cell.frozen]
        return ["def build(start):", *indented([*lines, "return m"])]

    def wrapper(self, w: Node, number: int, inside: str) -> list[str]:  # noqa: C901
        """The lines of `w{number}(m, x)`, a transform of the function `inside`."""
        what, form = w[:2]
        passed = bool(form % 2)
        args, call = ("(m, x)", inside) if passed else ("(x)", f"lambda x: {inside}(m, x)")
        items = f"x + F(0.1) * jnp.arange({LANES}, dtype=F)"
        pairs = args.replace("x)", "xs)")
        once: list[str] = []
        match what:
            case "jit" if form == 1:
                once = [f"jitted{number} = mu.jit({inside})"]
                body = [f"return jitted{number}(m, x)"]
            case "jit" | "remat" if form == 2:  # a module is a result
                body = [
                    f"out, again = mu.{what}(lambda n, x: ({inside}(n, x), m))(m, x)",
                    "assert again is m",
                    "return out",
                ]
            case "jit" | "remat" if form == 3:  # a bound method with a static argument
                body = [f"return mu.{what}(m.run, static_argnums=0)({inside}, x)"]
            case "jit" | "remat":
                body = [f"return mu.{what}({call}){args}"]
            case "grad":
                options = {"arg": "(0, 1)", "of": "of=m", "both": "argnums=0, of=m"}[w[2]]
                takes = "m, x" if w[2] == "arg" else "x"
                body = [
                    f"def loss({takes}):",
                    f"    out = {inside}(m, x)",
                    "    return squash(out), (out, m)",
                    f"(value, (out, again)), gradient = mu.value_and_grad(loss, {options}, has_aux=True, wrt={w[3]})({takes})",
                    "assert again is m",
                    "return value, out, gradient",
                ]
            case "vmap":
                options = (
                    "in_axes=0",
                    "in_axes=(None, 0)",
                    "states=mu.StateAxes({mu.RngState: mu.Shared})",
                    "in_axes=(None, 0)",
                )[form]
                body = [f"xs = {items}", f"return mu.vmap({call}, {options}){pairs}"]
            case "ensemble":
                others = {"": "", "Shared": "mu.RngState: mu.Shared, "}.get(w[2], f"mu.{w[2]}: None, ")
                axes = f"mu.StateAxes({{{others}...: {w[3]}}})" if others else w[3]
                options = f"in_axes=({axes}, 0)" if passed else f"states=[(m, {axes})]"
                body = [f"xs = {items}", f"return mu.vmap({call}, {options}){pairs}"]
            case "slices":
                others = f"mu.{w[2]}: mu.Carry, " if w[2] else ""
                axes = f"mu.StateAxes({{{others}...: {w[3]}}})"
                within = passed and w[3] == 0
                options = "" if within and not others else f", states={axes if within else f'[(m, {axes})]'}"
                body = [
                    f"def body(c, {'mx' if within else 'x'}):",
                    f"    out = {inside}({'*mx' if within else 'm, x'})",
                    "    return jnp.tanh(c + squash(out)), out",
                    f"return mu.scan(body, F(0.1), {f'(m, {items})' if within else items}{options})",
                ]
            case "scan" if passed:  # a module in the carry
                body = [
                    "def body(carry, x):",
                    f"    out = {inside}(carry[0], x)",
                    "    return (m, jnp.tanh(carry[1] + squash(out))), out",
                    f"(again, c), outs = mu.scan(body, (m, F(0.1)), {items})",
                    "assert again is m",
                    "return c, outs",
                ]
            case "scan":
                body = [
                    "def body(c, x):",
                    f"    out = {inside}(m, x)",
                    "    return jnp.tanh(c + squash(out)), out",
                    f"return mu.scan(body, F(0.1), {items})",
                ]
            case "for" | "map":
                body = [f"return mu.{'for_loop' if what == 'for' else 'map'}(lambda x: {inside}(m, x), {items})"]
            case "fori" if passed:
                step = f"lambda i, loop: (loop[0], jnp.tanh(loop[1] + squash({inside}(m, loop[1]))))"
                body = [f"again, c = mu.fori_loop(0, 2, {step}, (m, x))", "assert again is m", "return c"]
            case "fori":
                body = [f"return mu.fori_loop(0, 2, lambda i, c: jnp.tanh(c + squash({inside}(m, c))), x)"]
            case "while":
                body = [
                    "def step(loop):",
                    f"    return loop[0] + 1, jnp.tanh(loop[1] + squash({inside}(m, loop[1])))",
                    "return mu.while_loop(lambda loop: loop[0] < 2, step, (jnp.int32(0), x))",
                ]
            case "cond":
                test = f"jnp.sum({self.place('n0')}.value) % 2 == 0"
                other = f"lambda {args[1:-1]}: {inside}(m, x * F(-0.5))"
                body = [f"return mu.cond({test}, {call}, {other}, {args[1:]}"]
            case "functionalize":
                body = [
                    f"pure, state = mu.functionalize(lambda x: {inside}(m, x), of=m)",
                    f"out, new = jax.jit(pure)({'mu.state(m)' if passed else 'state'}, x)",
                    "mu.update(m, new)",
                    "return out",
                ]
            case _:
                raise AssertionError(w)
        return [*once, f"def w{number}(m, x):", *indented(body)]

    def make(self) -> list[str]:
        """`make(m)` gives the function to call."""
        program = ["acc = x", *self.block(self.case.program, ["x"], "acc"), "return acc"]
        lines = ["def program(m, x):", *indented(program)]
        inside = "program"
        for number, wrapper in reversed([*enumerate(self.case.wrappers)]):
            lines += self.wrapper(wrapper, number, inside)
            inside = f"w{number}"
        return ["def make(m):", *indented([*self.header, *lines, f"return {inside}"])]


def source(case: Case) -> str:
    """A case as Python: `build(start)` makes its model, `make(model)` the function of `(model, x)`."""
    emitter = Emitter(case)
    return "\n".join(
        [
            "class Node(mu.Module):",
            "    def run(self, f, x):",
            "        return f(self, x)",
            "",
            *emitter.build(),
            "",
            *emitter.make(),
            "",
        ]
    )


# -- by hand through plain JAX ---------------------------------------------------------------------------------------


def private(key: Any, count: Any, lane: Any) -> Values:
    """The stream of a lane; of a stack of streams, each has one."""
    if key.ndim:
        return jax.vmap(private, in_axes=(0, 0, None))(key, count, lane)
    return {"key": jax.random.fold_in(jax.random.fold_in(key, count), lane), "count": jnp.zeros((), "uint32")}


class Frame:
    """What a running function sees: the values of all states, the arguments in reach, and the result so far."""

    def __init__(self, values: Values, xs: Sequence[Any], acc: Any) -> None:
        self.values = dict(values)
        self.xs = list(xs)
        self.acc = acc


Body = Callable[[Values, Any, Any], tuple[Values, Any]]  # (values, x, acc) -> (values, acc)


class Reference:
    """Runs the syntax tree of a case; every value goes in and out by hand."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.cells = {cell.name: cell for cell in case.cells}
        self.layers = {cell.name for cell in case.cells if cell.layer}
        self.flag = "a"

    def selected(self, wrt: str) -> list[str]:
        kinds = {"mu.Param": ["Param"], "mu.Any(mu.Param, mu.Hidden)": ["Param", "Hidden"]}.get(wrt)
        return [
            cell.name
            for cell in self.case.cells
            if cell.type in "SVT" and not cell.frozen and (kinds is None or cell.kind in kinds)
        ]

    def taken(self, node: Any) -> Any:
        """A tree without the blocks that the flag rules out."""
        if not isinstance(node, tuple):
            return node
        if node and node[0] == "static":
            node = node[1 + (self.flag != "a")]
        return tuple(map(self.taken, node))

    def streams_used(self, node: Any, wrappers: Sequence[Node] = ()) -> set[str]:
        everything = any(w[0] == "functionalize" for w in wrappers)  # it writes all states back
        drawn = {inner[1] for inner in walk(self.taken(node), but="local") if inner[0] == "draw"}
        return {c.name for c in self.case.cells if c.type == "R" and (everything or c.name in drawn)}

    def vmap(
        self,
        f: Callable[[Values, Any], tuple[Values, Any]],
        values: Values,
        xs: Any,
        axes: Any,
        split: Mapping[str, int],
        used: set[str],
        alike: bool = False,
    ) -> tuple[Values, Any]:
        """`f(values, x)` in lanes.

        Args:
          split: the axes of the states that have one.
          used: the random streams that draw in `f`.
          alike: whether streams without an axis are the same in all lanes.
        """
        streams = [name for name, cell in self.cells.items() if cell.type == "R" and name not in split and not alike]

        def lane(values: Values, x: Any, number: Any) -> tuple[Values, Any]:
            values = dict(values)
            for name in streams:
                stream = values[name]
                values[name] = private(stream["key"], stream["count"], number)
            return f(values, x)

        count = LANES if axes is None else xs.shape[0]
        state_axes = {name: split.get(name) for name in values}
        out_axes = {name: split.get(name, 0) for name in values}
        new, out = jax.vmap(lane, in_axes=(state_axes, axes, 0), out_axes=(out_axes, 0), axis_name="lanes")(
            values, xs, jnp.arange(count, dtype="uint32")
        )
        new = {name: value if name in split else jax.tree.map(lambda v: v[0], value) for name, value in new.items()}
        for name in streams:
            stream = values[name]
            new[name] = {"key": stream["key"], "count": stream["count"] + np.uint32(name in used)}
        return new, out

    # -- expressions

    def evaluate(self, e: Node, frame: Frame) -> Any:  # noqa: C901
        def sub(e: Node) -> Any:
            return self.evaluate(e, frame)

        values = frame.values
        match e:
            case ("const", value):
                return jnp.asarray(value, F)
            case ("pair", pair):
                return jnp.asarray(pair, F)
            case ("x", up):
                return frame.xs[-1 - min(up, len(frame.xs) - 1)]
            case ("acc",):
                return frame.acc
            case ("read", name, _, _):
                counter = self.cells[name].type == "I"
                return values[name].astype(F) * F(0.1) if counter else values[name]
            case ("part", name, _, _, key):
                return values[name][key]
            case ("draw", name, _, type):
                stream = values[name]
                values[name] = {"key": stream["key"], "count": stream["count"] + np.uint32(1)}
                key = jax.random.fold_in(stream["key"], stream["count"])
                return jax.random.uniform(key, (2,) if type == "V" else ())
            case ("un", what, a):
                return getattr(jnp, what)(sub(a))
            case ("bin", what, a, b):
                left, right = sub(a), sub(b)
                return left + right if what == "+" else left - right if what == "-" else left * right
            case ("sum", a):
                return jnp.sum(sub(a))
            case ("mean", a):
                return jax.lax.pmean(sub(a), "lanes")
            case ("at", a, index):
                return sub(a)[self.index(index, frame)]
            case ("spread", a):
                return jnp.broadcast_to(sub(a), (2,))
            case ("flip", a):
                return sub(a)[::-1]
            case ("stack", a, b):
                return jnp.stack([sub(a), sub(b)])
            case ("where", test, a, b):
                return jnp.where(self.test(test, frame), sub(a), sub(b))
        raise AssertionError(e)

    def index(self, index: Any, frame: Frame) -> Any:
        return frame.values[index[1]] % index[2] if isinstance(index, tuple) else index

    def test(self, e: Node, frame: Frame) -> Any:
        match e:
            case ("odd", name):
                return frame.values[name] % 2 == 1
            case ("below", name, most):
                return frame.values[name] < most
            case ("above", a):
                return self.evaluate(a, frame) > F(THRESHOLD)
        raise AssertionError(e)

    # -- statements

    def body(self, block: Block, xs: Sequence[Any], own: bool = True, fresh: bool = False) -> Body:
        """A block as a pure function; `own`: it has an argument of its own, `fresh`: and sees no other."""

        def run(values: Values, x: Any, acc: Any) -> tuple[Values, Any]:
            frame = Frame(values, [*([] if fresh else xs), *([x] if own else [])], acc)
            self.execute_all(block, frame)
            return frame.values, frame.acc

        return run

    def execute_all(self, block: Block, frame: Frame) -> None:
        for statement in block:
            self.execute(statement, frame)

    def execute(self, s: Node, frame: Frame) -> None:
        values = frame.values
        match s:
            case ("acc", e):
                frame.acc = jnp.tanh(self.evaluate(e, frame))
            case ("count", name, _, form, k):
                old = values[name]
                values[name] = (old * 3 + k) % 7 if form == 1 else old + k
            case ("set", name, _, _, e):
                values[name] = jnp.tanh(self.evaluate(e, frame))
            case ("aug", name, _, _, e):
                values[name] = values[name] + F(0.1) * jnp.tanh(self.evaluate(e, frame))
            case ("item", name, _, index, e):
                new = jnp.tanh(self.evaluate(e, frame))
                values[name] = jnp.asarray(values[name]).at[self.index(index, frame)].set(new)
            case ("tree", name, _, _, key, e):
                values[name] = {**values[name], key: jnp.tanh(self.evaluate(e, frame))}
            case ("static", *blocks):
                self.execute_all(blocks[self.flag != "a"], frame)
            case ("born", number, form, counter):
                name = f"odd{form}{number}" if form > 2 else f"new{number}"
                if form != 2 or name not in values:
                    values[name] = values[counter] + 1
            case ("local", _, block):
                _, frame.acc = self.body(block, frame.xs, own=False)(values, None, frame.acc)
            case ("decay", _):
                for cell in self.case.cells:
                    if cell.kind == "Param":
                        values[cell.name] = jax.tree.map(lambda v: v * F(0.9), values[cell.name])
            case _:
                frame.values, frame.acc = getattr(self, f"run_{s[0]}")(s, frame)

    def argument(self, frame: Frame) -> Any:
        return jnp.sin(frame.xs[-1] + frame.acc)

    def items(self, frame: Frame, count: int) -> Any:
        return frame.xs[-1] + F(0.1) * jnp.arange(count, dtype=F)

    def run_cond(self, s: Node, frame: Frame) -> Any:
        yes, no = (self.body(block, frame.xs, own=False) for block in s[3:])
        test = self.test(s[1], frame)
        return jax.lax.cond(test, lambda v, a: yes(v, None, a), lambda v, a: no(v, None, a), frame.values, frame.acc)

    def run_switch(self, s: Node, frame: Frame) -> Any:
        _, counter, form, blocks = s
        index = frame.values[counter] - 1 if form else frame.values[counter] % len(blocks)
        bodies = [self.body(block, frame.xs, own=False) for block in blocks]
        branches = [lambda v, a, body=body: body(v, None, a) for body in bodies]
        return jax.lax.switch(index, branches, frame.values, frame.acc)

    def run_for(self, s: Node, frame: Frame) -> Any:
        _, count, reverse, block = s
        body, acc = self.body(block, frame.xs), frame.acc
        values, ys = jax.lax.scan(lambda v, x: body(v, x, acc), frame.values, self.items(frame, count), reverse=reverse)
        return values, squash(ys)

    def run_scan(self, s: Node, frame: Frame) -> Any:
        _, count, reverse, _, block = s
        body = self.body(block, frame.xs)

        def step(carry: Any, x: Any) -> Any:
            values, acc = body(carry[0], x, carry[1])
            return (values, acc), jnp.cos(acc)

        carry = frame.values, frame.acc
        (values, acc), ys = jax.lax.scan(step, carry, self.items(frame, count), reverse=reverse)
        return values, acc + F(0.1) * jnp.sum(ys)

    def run_fori(self, s: Node, frame: Frame) -> Any:
        _, count, traced, block = s
        body = self.body(block, frame.xs)
        last = jnp.int32(count) if traced else count
        first = jnp.int32(0) if traced else 0
        return jax.lax.fori_loop(
            first, last, lambda i, c: body(c[0], i.astype(F) * F(0.3), c[1]), (frame.values, frame.acc)
        )

    def run_while(self, s: Node, frame: Frame) -> Any:
        _, most, test, block = s
        body = self.body(block, frame.xs, own=False)

        def goes_on(loop: Any) -> Any:
            return (loop[0] < most) & self.test(test, Frame(loop[1], frame.xs, loop[2]))

        _, values, acc = jax.lax.while_loop(
            goes_on, lambda loop: (loop[0] + 1, *body(loop[1], None, loop[2])), (jnp.int32(0), frame.values, frame.acc)
        )
        return values, acc

    def run_jit(self, s: Node, frame: Frame) -> Any:
        body = self.body(s[2], frame.xs, fresh=s[1] >= 2)
        return jax.jit(body)(frame.values, self.argument(frame), frame.acc)

    def run_remat(self, s: Node, frame: Frame) -> Any:
        return jax.checkpoint(self.body(s[2], frame.xs))(frame.values, self.argument(frame), frame.acc)

    def run_grad(self, s: Node, frame: Frame) -> Any:
        _, form, wrt, block = s
        body, acc = self.body(block, frame.xs), frame.acc
        value, values, gradient = self.differentiate(
            lambda v, x: body(v, x, acc)[::-1], frame.values, self.argument(frame), wrt, form
        )
        return values, jnp.tanh(value + F(0.1) * squash(gradient))

    def run_jvp(self, s: Node, frame: Frame) -> Any:
        _, form, block = s
        body, values, acc, x = self.body(block, frame.xs), frame.values, frame.acc, self.argument(frame)
        names = [] if form == "x" else self.selected("mu.Param")

        def f(inputs: Values, x: Any) -> Any:
            return body({**values, **inputs}, x, acc)[::-1]

        inputs = {name: values[name] for name in names}
        if form == "of":
            gradient, values = jax.jacfwd(f, has_aux=True)(inputs, x)
            return values, squash(gradient)
        tangents = jax.tree.map(jnp.ones_like, inputs), jnp.float32(0.5)
        value, tangent, values = jax.jvp(f, (inputs, x), tangents, has_aux=True)
        return values, jnp.tanh(value + F(0.1) * tangent)

    def differentiate(self, f: Any, values: Values, x: Any, wrt: str, form: str) -> Any:
        """The result of `f(values, x) -> (loss, aux)` and its gradients."""
        names = self.selected(wrt)

        def loss(inputs: Values, x: Any) -> Any:
            return f({**values, **inputs}, x)

        inputs = {name: jax.tree.map(jnp.asarray, values[name]) for name in names}
        (value, aux), (states, gx) = jax.value_and_grad(loss, (0, 1), has_aux=True)(inputs, x)
        return value, aux, states if form == "of" else (states, gx)

    def run_vmap(self, s: Node, frame: Frame) -> Any:
        body, acc = self.body(s[2], frame.xs), frame.acc
        values, ys = self.vmap(
            lambda v, x: body(v, x, acc), frame.values, self.items(frame, LANES), 0, {}, self.streams_used(s[2])
        )
        return values, squash(ys)

    def run_map(self, s: Node, frame: Frame) -> Any:
        _, batch, block = s
        if not batch:
            return self.run_for(("for", LANES, False, block), frame)
        body, acc = self.body(block, frame.xs), frame.acc
        values, parts = frame.values, []
        xs = self.items(frame, LANES)
        for start in range(0, LANES, batch):
            values, ys = self.vmap(
                lambda v, x: body(v, x, acc), values, xs[start : start + batch], 0, {}, self.streams_used(block)
            )
            parts.append(ys)
        return values, squash(parts)

    def run_layers(self, s: Node, frame: Frame) -> Any:
        _, form, block = s
        body = self.body(block, frame.xs, own=False)
        if form == "scan":

            def step(carry: Any, layer: Values) -> Any:
                values, acc = body({**carry[0], **layer}, None, carry[1])
                return ({k: v for k, v in values.items() if k not in layer}, acc), {k: values[k] for k in layer}

            carried = {k: v for k, v in frame.values.items() if k not in self.layers}
            (values, acc), layers = jax.lax.scan(step, (carried, frame.acc), {k: frame.values[k] for k in self.layers})
            return {**values, **layers}, acc
        values, ys = self.vmap(
            lambda v, acc: body(v, None, acc),
            frame.values,
            frame.acc,
            None,
            dict.fromkeys(self.layers, 0),
            self.streams_used(block),
        )
        return values, squash(ys)

    # -- the transforms around the program

    def run(self, values: Values, x: Any, depth: int = 0) -> tuple[Values, Any]:  # noqa: C901
        """The program inside its transforms from `depth` inwards: the new values and the result."""
        if depth == len(self.case.wrappers):
            return self.body(self.case.program, [])(values, x, x)
        w, rest = self.case.wrappers[depth], self.case.wrappers[depth + 1 :]
        xs = x + F(0.1) * jnp.arange(LANES, dtype=F)

        def inside(values: Values, x: Any) -> tuple[Values, Any]:
            return self.run(values, x, depth + 1)

        match w[0]:
            case "jit" | "functionalize":
                return jax.jit(inside)(values, x)
            case "remat":
                return jax.checkpoint(inside)(values, x)
            case "grad":

                def loss(values: Values, x: Any) -> Any:
                    new, out = inside(values, x)
                    return squash(out), (new, out)

                value, (new, out), gradient = self.differentiate(loss, values, x, w[3], w[2])
                return new, (value, out, gradient)
            case "vmap":
                used = self.streams_used(self.case.program, rest)
                return self.vmap(inside, values, xs, 0, {}, used, w[1] == 2)
            case "ensemble":
                others = "RngState" if w[2] == "Shared" else w[2]
                split = {c.name: w[3] for c in self.case.cells if c.kind != others}
                used = self.streams_used(self.case.program, rest)
                return self.vmap(inside, values, xs, 0, split, used, w[2] == "Shared")
            case "slices":
                return self.slices(inside, values, xs, {c.name for c in self.case.cells if c.kind != w[2]}, w[3])
            case "scan":

                def body(carry: Any, x: Any) -> Any:
                    values, out = inside(carry[0], x)
                    return (values, jnp.tanh(carry[1] + squash(out))), out

                (values, c), outs = jax.lax.scan(body, (values, jnp.asarray(0.1, F)), xs)
                return values, (c, outs)
            case "for" | "map":
                return jax.lax.scan(inside, values, xs)
            case "fori" | "while":

                def step(_: Any, loop: Any) -> Any:
                    values, out = inside(loop[0], loop[1])
                    return values, jnp.tanh(loop[1] + squash(out))

                values, c = jax.lax.fori_loop(0, 2, step, (values, x))
                return values, c if w[0] == "fori" else (jnp.int32(2), c)
            case "cond":
                test = jnp.sum(values["n0"]) % 2 == 0
                return jax.lax.cond(test, inside, lambda v, x: inside(v, x * F(-0.5)), values, x)
        raise AssertionError(w)

    def slices(self, inside: Any, values: Values, xs: Any, split: set[str], axis: int) -> tuple[Values, Any]:
        """A loop over slices of states, and the rest carried."""

        def body(carry: Any, inputs: Any) -> Any:
            values, out = inside({**carry[0], **inputs[0]}, inputs[1])
            carried = {name: value for name, value in values.items() if name not in split}
            return (carried, jnp.tanh(carry[1] + squash(out))), ({name: values[name] for name in split}, out)

        def move(value: Any, old: int, new: int) -> Any:
            return jax.tree.map(lambda v: jnp.moveaxis(v, old, new), value)

        carried = {name: value for name, value in values.items() if name not in split}
        stacked = {name: move(values[name], axis, 0) for name in split}
        (carried, c), (stacked, outs) = jax.lax.scan(body, (carried, jnp.asarray(0.1, F)), (stacked, xs))
        return {**carried, **{name: move(value, 0, axis) for name, value in stacked.items()}}, (c, outs)


# -- the comparison --------------------------------------------------------------------------------------------------


class Bomb(Exception):
    """What a program raises in the middle."""


FUSE = [-1]  # how many blocks run until it does


def tick() -> None:
    """What programs call that are to raise."""
    FUSE[0] -= 1
    if FUSE[0] == 0:
        raise Bomb


class Difference(AssertionError):
    """The library and the reference do not agree."""


def as_numpy(tree: Any) -> Any:
    """Arrays as NumPy arrays, keys as their data."""

    def plain(v: Any) -> Any:
        if isinstance(v, float):  # what comes in may come out
            return np.asarray(v, F)
        key = isinstance(v, jax.Array) and jnp.issubdtype(v.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(v) if key else v)

    return jax.tree.map(plain, tree)


def same(got: Any, expected: Any, what: str, exact: bool = False) -> None:
    """Raise unless two results are equal, up to the rounding of floats."""
    got, expected = as_numpy(got), as_numpy(expected)
    if jax.tree.structure(got) != jax.tree.structure(expected):
        raise Difference(f"{what}: {jax.tree.structure(got)} is not {jax.tree.structure(expected)}")
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        where = f"{what}{jax.tree_util.keystr(path)}"
        if a.shape != b.shape or a.dtype != b.dtype:
            raise Difference(f"{where}: got {a.dtype}{a.shape}, expected {b.dtype}{b.shape}")
        close = np.array_equal(a, b) if exact or a.dtype != F else np.allclose(a, b, rtol=2e-4, atol=2e-5)
        if not close:
            raise Difference(f"{where}: got {a}, expected {b}")


class Model:
    """One model of a run, with what is expected of it."""

    def __init__(self, case: Case, space: dict[str, Any], number: int) -> None:
        self.case = case
        self.space = space
        start = {cell.name: start_of(cell, number) for cell in case.cells}
        self.model = space["build"](start)
        found = {c.name: eval(self.cell_at(c), {"m": self.model}) for c in case.cells if c.kind != "Buffer"}
        by_id = {id(cell): name for name, cell in found.items()}
        self.paths = {path: by_id.get(id(cell), "b0") for path, cell in mu.variables(self.model).items()}
        self.live = list(mu.variables(self.model).values())
        self.definition = mu.graphdef(self.model)
        self.expected: Values = jax.tree.map(jnp.asarray, start)

    @staticmethod
    def cell_at(cell: CellSpec) -> str:
        return f"{cell.places[0]}.streams[{cell.stream!r}]" if cell.type == "R" else cell.places[0]

    def named(self, out: Any) -> Any:
        """A result with the `State`s in it as plain dictionaries by name of the state."""
        if isinstance(out, mu.State):
            return {self.paths.get(path, path[-1]): value for path, value in out.items()}
        if isinstance(out, tuple):
            return tuple(map(self.named, out))
        return out

    def check(self, what: str, exact: bool = False, expected: Mapping[str, Any] | None = None) -> None:
        """Compare all states, and see that nothing else has changed."""
        same(self.named(mu.state(self.model)) | self.odd(), expected or self.expected, what, exact)
        if contains(self.case.program, "born") and not exact:
            return
        if mu.graphdef(self.model) != self.definition:
            raise Difference(f"{what}: another structure")
        if any(a is not b for a, b in zip(self.live, mu.variables(self.model).values(), strict=True)):
            raise Difference(f"{what}: other cells")

    def odd(self) -> Values:
        """The states that the program put outside of the model."""
        cells = {**self.space["ODD"], **{name: cell for name, (cell,) in vars(self.space["BOX"]).items()}}
        return {name: cell.value for name, cell in cells.items()}

    def switch(self, flag: str) -> None:
        self.model.flag = flag
        self.definition = mu.graphdef(self.model)


class Run:
    """A case that is set up: its models, the function, and the reference."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.text = source(case)
        file = f"<program {case.seed}>"
        linecache.cache[file] = (len(self.text), None, self.text.splitlines(keepends=True), file)
        space: dict[str, Any] = {"mu": mu, "jax": jax, "jnp": jnp, "np": np, "F": F, "squash": squash, "tick": tick}
        space |= {"ODD": {}, "BOX": types.SimpleNamespace()}
        exec(compile(self.text, file, "exec"), space)
        self.models = [Model(case, space, number) for number in range(1 + case.twins)]
        self.make = space["make"]
        self.f = self.make(self.models[0].model)
        # What a function closed over is of the first model.
        bound = any(node[0] == "jit" and node[1] == 3 for node in walk(case.program))
        self.functions = [self.make(model.model) if bound else self.f for model in self.models]
        self.references: dict[str, Any] = {}

    def reference(self, values: Values, x: Any, flag: str) -> tuple[Values, Any]:
        if flag not in self.references:
            reference = Reference(self.case)
            reference.flag = flag
            self.references[flag] = jax.jit(reference.run)
        return self.references[flag](values, x)  # type: ignore[no-any-return]

    def call(self, number: int) -> None:
        """One call, with the flag up or down."""
        flag = "ab"[number % 2] if contains(self.case.program, "static") else "a"
        for i, (m, f) in enumerate(zip(self.models, self.functions, strict=True)):
            x = 0.3 + 0.4 * number - 0.1 * i
            if flag != m.model.flag:
                m.switch(flag)
            held = dict(mu.state(m.model)) if self.case.watched else {}
            copies = as_numpy(held)
            out = f(m.model, x if self.case.weak else jnp.asarray(x, F))
            m.expected, expected = self.reference(m.expected, jnp.asarray(x, F), flag)
            same(m.named(out), expected, f"call {number}, result ")
            if self.case.watched or number == self.case.calls - 1:
                m.check(f"call {number}, state ")
            same(held, copies, f"call {number}, array held before ", exact=True)

    def look(self) -> None:
        """Evaluate without running: nothing may have changed."""
        m = self.models[0]
        before = jax.tree.map(jnp.array, m.named(mu.state(m.model)) | m.odd())
        m.definition = mu.graphdef(m.model)
        m.live = list(mu.variables(m.model).values())
        x = jnp.asarray(0.3, F)
        shapes = m.named(mu.eval_shape(self.f, m.model, x))
        _, expected = jax.eval_shape(lambda v, x: self.reference(v, x, m.model.flag), m.expected, x)
        a, b = (jax.tree.map(lambda v: (v.shape, str(v.dtype)), tree) for tree in (shapes, expected))
        if a != b:
            raise Difference(f"abstract result: got {a}, expected {b}")
        mu.make_jaxpr(self.f)(m.model, x)
        m.check("after an abstract evaluation, state ", exact=True, expected=before)

    def explode(self) -> None:
        """One more call that raises in the middle: nothing may have changed."""
        m = self.models[0]
        before = jax.tree.map(jnp.array, m.named(mu.state(m.model)) | m.odd())
        m.definition = mu.graphdef(m.model)
        m.live = list(mu.variables(m.model).values())
        FUSE[0] = 1 + self.case.seed % 5
        x = jnp.asarray(0.1, F)
        try:
            self.make(m.model)(m.model, x)
        except Bomb:
            m.check("after an exception, state ", exact=True, expected=before)
        else:  # the program was kept, or is shorter
            m.expected, _ = self.reference(m.expected, x, m.model.flag)
        FUSE[0] = -1
        self.call(self.case.calls)


def run_case(case: Case) -> None:
    """Run a case and compare.

    Raises:
      Difference: the library and the reference do not agree.
    """
    run = Run(case)
    for number in range(case.calls):
        run.call(number)
    if case.abstract:
        run.look()
    if case.bomb and case.wrappers:
        run.explode()


STATEMENTS = {"set", "aug", "item", "tree", "count", "acc", "static", "born", "local", "decay"} | {
    name.removeprefix("run_") for name in vars(Reference) if name.startswith("run_")
}


def is_block(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(s, tuple) and s and s[0] in STATEMENTS for s in node)


def is_scalar(e: Any) -> bool:
    """Whether a part of a tree is surely a scalar expression, and not the simplest one."""
    match e:
        case ("sum" | "at" | "part", *_):
            return e[0] != "part" or e[-1] == "a"
        case ("draw", _, _, type):
            return bool(type == "S")
        case ("x", _):
            return True
        case ("un" | "where" | "bin", *parts):
            return is_scalar(parts[-1]) or parts[-1][0] in ("const", "acc")
    return False


def smaller(node: Any) -> Iterator[Any]:
    """Trees with one thing less."""
    if not isinstance(node, tuple):
        return
    if node and is_block(node):
        for i, statement in enumerate(node):
            yield (*node[:i], *node[i + 1 :])
            for part in statement[1:]:
                if is_block(part):
                    yield (*node[:i], *part, *node[i + 1 :])
    if is_scalar(node):
        yield ("const", 0.5)
        yield from (part for part in node[1:] if is_scalar(part))
    for i, part in enumerate(node):
        for new in smaller(part):
            yield (*node[:i], new, *node[i + 1 :])


def splits(wrapper: Node, cell: CellSpec) -> bool:
    """Whether a transform gives the state an axis."""
    return wrapper[0] in ("ensemble", "slices") and cell.kind != ("RngState" if wrapper[2] == "Shared" else wrapper[2])


def unstacked(cell: CellSpec, wrappers: Sequence[Node], without: int) -> tuple[int, ...]:
    """The axes of a state when one transform is gone."""
    return tuple(w[3] for i, w in enumerate(wrappers) if i != without and splits(w, cell))


def smaller_cases(case: Case) -> Iterator[Case]:
    for i in range(len(case.wrappers)):
        cells = tuple(dataclasses.replace(cell, stack=unstacked(cell, case.wrappers, i)) for cell in case.cells)
        yield dataclasses.replace(case, cells=cells, wrappers=case.wrappers[:i] + case.wrappers[i + 1 :])
    for program in smaller(case.program):
        yield dataclasses.replace(case, program=program)
    simpler: list[dict[str, Any]] = [{"calls": case.calls - 1}, {"watched": True}]
    for changes in [*simpler, *({name: False} for name in ("bomb", "twins", "weak", "abstract"))]:
        new = dataclasses.replace(case, **changes)
        if new != case and new.calls:
            yield new
    if any(len(line.split(" = ")[0].split(".")) != 2 for line in case.layout):  # no inner modules, lists or ties
        flat = [
            c if c.layer else dataclasses.replace(c, places=("m.rngs" if c.type == "R" else f"m.{c.name}",))
            for c in case.cells
        ]
        lines = [line for line in case.layout if line.startswith("m.layers")]
        lines += dict.fromkeys(f"{c.places[0]} = {c.places[0][2:]}" for c in flat if not c.layer)
        yield dataclasses.replace(case, cells=tuple(flat), layout=tuple(lines))
    else:
        used = {name for inner in walk(case.program) for name in inner[1:2] if isinstance(name, str)} | {"n0", "p0"}
        used |= {inner[1] for inner in walk(case.program) if inner[0] == "counter"}
        for cell in case.cells:
            if cell.name not in used and cell.type != "R" and not cell.layer:
                yield dataclasses.replace(
                    case,
                    cells=tuple(c for c in case.cells if c is not cell),
                    layout=tuple(line for line in case.layout if not line.endswith(f"= {cell.name}")),
                )


def shrink(case: Case, fails: Callable[[Case], bool], seconds: float = 120) -> Case:
    """A smaller case that still fails: one thing less at a time, as long as it does."""
    until = time.monotonic() + seconds
    again = True
    while again and time.monotonic() < until:
        again = False
        for new in smaller_cases(case):
            if time.monotonic() > until:
                break
            if fails(new):
                case, again = new, True
                break
    return case


def fails_alike(first: Exception) -> Callable[[Case], bool]:
    """Whether a case fails in the way that another did."""
    text = str(first)[:40]

    def fails(case: Case) -> bool:
        try:
            run_case(case)
        except Difference:
            return isinstance(first, Difference)
        except Exception as error:
            return type(error) is type(first) and str(error)[:40] == text
        return False

    return fails


def show(case: Case) -> str:
    """A case as a script to run."""

    def literal(cell: CellSpec) -> str:
        start = start_of(cell)
        if cell.type != "R":
            return repr(start)
        shape = start["count"].shape
        key = f"jax.random.split(jax.random.key(0), {shape})" if shape else "jax.random.key(0)"
        return f"{{'key': {key}, 'count': jnp.zeros({shape}, 'uint32')}}"

    starts = "\n".join(f"    {cell.name!r}: {literal(cell)}," for cell in case.cells)
    return f"""import jax, jax.numpy as jnp, numpy as np, mutatis as mu
from numpy import array, float32, int32
F = np.float32
def squash(tree):
    return jnp.tanh(sum((jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(tree)), F(0)))
{source(case)}
m = build({{
{starts}
}})
f = make(m)
for number in range({case.calls}):
    print(f(m, jnp.asarray(0.3 + 0.4 * number, F)))
    print(mu.state(m).to_pure_dict())
# {case}
"""


def check(seed: int) -> None:
    """Run the case of a seed; a failure shows it, made small."""
    case = make_case(seed)
    try:
        run_case(case)
    except Exception as error:
        fails, text = fails_alike(error), f"{type(error).__name__}: {error}"
    else:
        return
    raise AssertionError(f"seed {seed}: {text}\n\n{show(shrink(case, fails))}")


@pytest.mark.parametrize("seed", [pytest.param(n, marks=pytest.mark.once if n >= 30 else ()) for n in range(100)])
def test_random_programs(seed: int) -> None:
    check(seed)


@pytest.mark.slow
def test_many_random_programs() -> None:
    """Fresh programs, `MUTATIS_PROGRAMS` of them (2000), from `MUTATIS_SEED` (a random one) on."""
    first = int(os.environ.get("MUTATIS_SEED", random.SystemRandom().randrange(2**31)))
    for seed in range(first, first + int(os.environ.get("MUTATIS_PROGRAMS", "2000"))):
        check(seed)
        if seed % 50 == 0:
            jax.clear_caches()
            gc.collect()


# -- what random programs found --------------------------------------------------------------------------------------


def test_a_numpy_number_on_the_left_of_a_variable() -> None:
    v = mu.Param(1.5)
    assert isinstance(F(2) * v, jax.Array), "as `F(2) * v.value` is"
    assert float(mu.jit(lambda: F(2) * v)()) == 3
    np.testing.assert_array_equal(mu.jit(lambda: np.array([1, 2], F) - v)(), [-0.5, 0.5])
    assert bool(mu.jit(lambda: F(2) > v)())


def test_pairs_choose_the_axes_of_a_module_in_xs() -> None:
    m = mu.Module()
    m.w, m.h = mu.Param(jnp.ones(2)), mu.Hidden(jnp.zeros(3))

    def body(c: Any, m: Any) -> Any:
        m.w.value = m.w.value + F(1)
        m.h.value = m.h.value + F(1)
        return c, None

    mu.scan(body, 0.0, m, states=[(m, mu.StateAxes({mu.Param: mu.Carry, ...: 0}))])
    np.testing.assert_array_equal(m.w.value, [4, 4])
    np.testing.assert_array_equal(m.h.value, [1, 1, 1])


def test_lanes_share_an_ensemble_with_random_streams() -> None:
    def member(key: Any) -> Any:
        m = mu.Module()
        m.rngs = mu.Rngs(key)
        return m

    ensemble = mu.vmap(member)(jax.random.split(jax.random.key(0), 3))

    def on_item(x: Any) -> Any:
        return mu.vmap(lambda m: x + jax.random.uniform(m.rngs()))(ensemble)

    key, count = ensemble.rngs.default.value["key"], ensemble.rngs.default.value["count"]
    expected = [
        [jax.random.uniform(jax.random.fold_in(private(k, n, lane)["key"], 0)) for k, n in zip(key, count, strict=True)]
        for lane in range(2)
    ]
    np.testing.assert_allclose(mu.vmap(on_item)(jnp.zeros(2)), expected)
    np.testing.assert_array_equal(ensemble.rngs.default.value["count"], [1, 1, 1])


@pytest.mark.parametrize(
    "inside",
    [
        lambda m, draw, x: mu.jit(draw)(x),
        lambda m, draw, x: mu.grad(draw)(x),
        lambda m, draw, x: mu.cond(x > 1, draw, lambda x: x, x),
        lambda m, draw, x: mu.for_loop(draw, jnp.stack([x, x])),
        lambda m, draw, x: mu.while_loop(lambda c: c < 2, draw, x),
        lambda m, draw, x: mu.vmap(draw)(jnp.stack([x, x])),
        lambda m, draw, x: mu.remat(draw)(x),
        lambda m, draw, x: mu.jit(mu.remat(draw))(x),
    ],
    ids=["jit", "grad", "cond", "for_loop", "while_loop", "vmap", "remat", "jit of remat"],
)
def test_draws_inside_other_transforms_in_lanes(inside: Any) -> None:
    m = mu.Module()
    m.rngs = mu.Rngs(0)
    key = m.rngs.default.value["key"]
    mu.vmap(lambda x: inside(m, lambda x: x + jax.random.uniform(m.rngs()), x))(jnp.arange(3.0))
    assert int(m.rngs.default.value["count"]) == 1
    assert m.rngs.default.value["key"] == key


def through_raw_jit(f: Any, model: Any, x: Any) -> Any:
    pure, state = mu.functionalize(f, of=model)
    out, new = jax.jit(pure)(state, x)
    mu.update(model, new)
    return out


def test_a_stream_that_comes_back_from_raw_jax_in_lanes_is_refused() -> None:
    """Whether `update` gives a lane its own stream back, or another one, cannot be told from the arrays."""
    m = mu.Module()
    m.rngs = mu.Rngs(0)
    with pytest.raises(mu.errors.LaneError, match="random stream"):
        mu.vmap(lambda x: through_raw_jit(lambda x: x + jax.random.uniform(m.rngs()), m, x))(jnp.arange(3.0))
    assert int(m.rngs.default.value["count"]) == 0


def in_jit(f: Any) -> None:
    mu.jit(f)()


def in_remat(f: Any) -> None:
    mu.remat(f)()


def in_cond(f: Any) -> None:
    mu.cond(True, f, f)


def in_vmap(f: Any) -> None:
    mu.vmap(lambda _: f())(jnp.zeros(2))


@pytest.mark.parametrize("inside", [lambda f: f(), in_jit, in_remat, in_cond, in_vmap])
@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("how", ["reseed", "value", "in place"])
def test_streams_that_are_set_in_lanes(inside: Any, drawn: bool, how: str) -> None:
    """They are set for all lanes, after draws and before, however deep and in cached programs too."""
    rngs = mu.Rngs(0)

    def restart() -> None:
        if how == "reseed":
            mu.reseed(rngs, default=7)
        elif how == "value":
            rngs.default.state.value = {"key": jax.random.key(7), "count": np.uint32(3)}
        else:
            rngs.default.state.value["key"] = jax.random.key(7)
            rngs.default.state.value["count"] = jnp.uint32(3)

    def f(x: Any) -> Any:
        if drawn:
            rngs()
        inside(restart)
        return x

    twin = mu.Rngs(0)
    if how == "reseed":
        mu.reseed(twin, default=7)
    else:
        twin.default.state.value = {"key": jax.random.key(7), "count": np.uint32(3)}
    for _ in range(2):
        mu.vmap(f)(jnp.arange(3.0))
        assert mu.state(rngs) == mu.state(twin)
        rngs()  # so that the second time changes something


def test_a_stream_that_is_set_in_a_loop_in_lanes_is_refused() -> None:
    """What a loop carries differs from lane to lane if it did at the start: that all lanes end alike is not known."""
    rngs = mu.Rngs(0)

    def body(carry: Any, _: Any) -> Any:
        return carry, mu.reseed(rngs, default=7)

    with pytest.raises(mu.errors.LaneError, match="random stream"):
        mu.vmap(lambda x: mu.scan(body, x, length=2)[0])(jnp.arange(3.0))
    assert mu.state(rngs) == mu.state(mu.Rngs(0))


def test_a_key_that_is_set_in_place() -> None:
    rngs = mu.Rngs(0)

    @mu.jit
    def restart() -> None:
        rngs.default.state.value["key"] = jax.random.key(7)

    restart()
    assert mu.state(rngs) == mu.state(mu.Rngs(7))
