"""Units: quantities of saiunit or brainunit as the plain numbers that neurons, synapses and delays compute with.

Times are in milliseconds, potentials in millivolts. A parameter or an input says its unit, and takes a number, which is in that
unit, or a quantity of the same dimension.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mutatis.core import naming
from mutatis.core.showing import show_value
from mutatis.errors import ArgumentError
from mutatis.model.contexts import Context

dt = Context("dt", 1.0)
"""The length of a step in time, in ms as all times here: ``nn.dt.get()``, and ``with nn.dt.set(0.1):`` for another one."""

_UNITS: Mapping[str, Callable[[Any], Any]] = {
    "": lambda units: units.UNITLESS,
    "ms": lambda units: units.ms,
    "mV": lambda units: units.mV,
    "nA": lambda units: units.nA,
    "MOhm": lambda units: units.Mohm,
    "Hz": lambda units: units.Hz,
    "1/ms": lambda units: units.kHz,
    "mV/ms": lambda units: units.mV / units.ms,
    "uF/cm^2": lambda units: units.uF / units.cm**2,
    "mS/cm^2": lambda units: units.mS / units.cm**2,
    "uA/cm^2": lambda units: units.uA / units.cm**2,
}


def has_unit(value: Any) -> bool:
    """Whether a value is a quantity."""
    return hasattr(value, "to_decimal")


def package_of(quantity: Any) -> Any:
    """The package that a quantity is of."""
    return importlib.import_module(type(quantity).__module__.partition(".")[0])


def without_unit(value: Any) -> tuple[Any, Callable[[Any], Any]]:
    """A quantity as a number, and the function that gives a number its unit again; of a number itself, and the identity."""
    if not has_unit(value):
        return value, lambda x: x
    unit = package_of(value).get_unit(value)
    return value.to_decimal(unit), lambda x: x * unit


def in_unit(value: Any, unit: str, name: str) -> Any:
    """A quantity as a number of a unit; numbers as they are.

    Args:
      value: a number, an array, or a quantity.
      unit: one of the units here; an empty string for numbers without one.
      name: the name of the parameter, for messages.

    Raises:
      ArgumentError: it is no number, or the quantity has another dimension.
    """
    if not has_unit(value):
        _check_real(value, unit, name)
        return value
    units = package_of(value)
    meant = _UNITS[unit](units)
    if units.have_same_dim(value, meant):
        return value.to_decimal(meant)
    raise ArgumentError(
        f"`{name}` is in a unit that does not fit",
        path=name,
        where=naming.where(),
        expected=f"a number, or a quantity in {unit}" if unit else "a number without a unit",
        got=f"a quantity in {units.get_unit(value)}: {value}",
        cure=f"A quantity divided by its unit is a number: `x / {units.__name__}.get_unit(x)`"
        + (f", which is taken as one of {unit}." if unit else "."),
    )


def _check_real(value: Any, unit: str, name: str) -> None:
    try:
        dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    except ValueError:  # rows of different lengths
        dtype = np.dtype(object)
    if any(jnp.issubdtype(dtype, sort) for sort in (np.floating, np.integer, np.bool_)):
        return
    raise ArgumentError(
        f"`{name}` is no real number",
        path=name,
        where=naming.where(),
        expected="a number or an array of numbers" + (f", in {unit}" if unit else ""),
        got=show_value(value),
        cure="Of a complex number, its real part: `x.real`; of a string, `float(x)`.",
    )


def step_length() -> Any:
    """The length of a step, in milliseconds: a Python number, or an array.

    Raises:
      ArgumentError: what `nn.dt` is set to is no time above 0.
    """
    given = dt.get()
    step = in_unit(given, "ms", "nn.dt") if has_unit(given) else given
    if isinstance(step, np.number | np.ndarray) and np.ndim(step) == 0:
        step = step.item()
    number = isinstance(step, float | int) or (hasattr(step, "dtype") and step.ndim == 0 and step.dtype != bool)
    number = number and not isinstance(step, bool)
    known = number and not isinstance(step, jax.core.Tracer)
    if not number or (known and not 0 < float(step) < float("inf")):
        raise ArgumentError(
            "`nn.dt`, the length of a step in time, is no time",
            path="nn.dt",
            where=naming.where(),
            expected="a number of milliseconds above 0, or a quantity of time",
            got=show_value(given),
            cure="`with nn.dt.set(0.1): ...`",
        )
    return step


def in_steps(time: Any, name: str) -> Any:
    """A number of steps: a quantity of time divided by the length of a step; numbers as they are."""
    number = in_unit(time, "ms", name)
    return number / step_length() if has_unit(time) else number


def check_slope(f: str, y: Any, slope: Any, step: Any) -> None:
    """Raise unless a derivative times a step has the unit of the value.

    Args:
      f: the function that makes the step, for messages.
      y: the value.
      slope: its derivative by time.
      step: the length of the step.

    Raises:
      ArgumentError: it has another.
    """
    quantity = next(filter(has_unit, (y, slope, step)), None)
    if quantity is None:
        return
    units = package_of(quantity)
    if units.have_same_dim(units.get_unit(slope) * units.get_unit(step), units.get_unit(y)):
        return
    meant = units.get_unit(y) / units.get_unit(slope)
    raise ArgumentError(
        f"`nn.{f}` was given a step whose unit does not fit the derivative",
        path="step",
        where=naming.where(),
        expected=f"a step {_show(meant, units)}, since y is {_show(units.get_unit(y), units)} and f(y) "
        f"{_show(units.get_unit(slope), units)}",
        got=f"a step {_show(units.get_unit(step), units)}: {show_value(step)}",
        cure=f"Give all three their units, `nn.{f}(lambda v: -v / (10 * {units.__name__}.ms), v, 0.1 * {units.__name__}.ms)`; "
        "or none of them.",
    )


def _show(unit: Any, units: Any) -> str:
    return "without a unit" if units.have_same_dim(unit, units.UNITLESS) else f"in {unit}"
