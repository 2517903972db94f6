"""Matrix products of a function, read from its trace: what each multiplies, and what that is of.

    function, abstract arguments and names of their leaves --trace--> (FLOPs, names, names) each

Nothing is compiled. An operand's names are those of all leaves that it was computed from, so that
one can tell which products a backward pass adds.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.extend import core

Names = frozenset[str]


def products(
    function: Callable[..., Any], arguments: tuple, names: list[Names]
) -> list[tuple[float, Names, Names]]:
    """`names` are of the arguments' leaves, in their order. Raises TypeError for a loop."""
    found: list[tuple[float, Names, Names]] = []
    _walk(jax.make_jaxpr(function)(*arguments).jaxpr, names, found)
    return found


def without_mesh() -> AbstractContextManager:
    """Where all devices' products are counted together, whatever mesh the caller has."""
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def _walk(jaxpr: Any, given: list[Names], found: list) -> list[Names]:
    """The names of what a jaxpr gives; its products are added to `found`."""
    known: dict[Any, Names] = dict(zip(jaxpr.invars, given, strict=True))

    def of(variable: Any) -> Names:
        # A constant of the trace is nobody's.
        return frozenset() if isinstance(variable, core.Literal) else known.get(variable, Names())

    for step in jaxpr.eqns:
        operands = [of(variable) for variable in step.invars]
        inner = _inner(step)
        if inner is not None:
            results = _walk(inner, operands, found)
        else:
            if step.primitive.name == "dot_general":
                found.append((_flops(step), *operands))
            results = [Names().union(*operands)] * len(step.outvars)
        known.update(zip(step.outvars, results, strict=True))
    return [of(variable) for variable in jaxpr.outvars]


def _inner(step: Any) -> Any:
    """The jaxpr that a step calls once with its own operands; None where it calls none."""
    called = [value for value in step.params.values() if _is_jaxpr(value)]
    if not called:
        return None
    jaxpr = getattr(called[0], "jaxpr", called[0])
    if len(called) > 1 or len(jaxpr.invars) != len(step.invars) or step.primitive.name in _LOOPS:
        raise TypeError(f"products of {step.primitive.name} cannot be counted from a trace")
    return jaxpr


_LOOPS = ("scan", "while", "cond")


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


def _flops(step: Any) -> float:
    """Two for each multiplication of a product."""
    (summed, _), _ = step.params["dimension_numbers"]
    left, result = step.invars[0].aval.shape, step.outvars[0].aval.shape
    return 2.0 * math.prod(result) * math.prod(left[axis] for axis in summed)
