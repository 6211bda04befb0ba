"""Small formulas in data files: `heads * head_dim`, `i >= first_k_dense_replace and i not in mlp_only_layers`.

Rows of `architectures.toml` say sizes and conditions as text over the fields of a configuration. They are parsed as Python expressions and
walked here, node by node; nothing but arithmetic, comparisons, `and`, `or`, `not` and `in` exists, so a formula can do nothing else.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from fewbit.errors import UnsupportedModelError

__all__ = ["evaluate"]

_OPERATORS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda item, items: item in items,
    ast.NotIn: lambda item, items: item not in items,
}


def evaluate(text: str, names: Mapping[str, Any]) -> Any:
    """The value of a formula.

    Args:
        text: for example `2 * inner`.
        names: what its names mean; `vision.hidden_size` looks `hidden_size` up in the mapping `vision`.

    Raises:
        UnsupportedModelError: a name that is not there, or values that do not go with the operator; the message has the formula.
    """
    try:
        return _value(_parsed(text), names)
    except KeyError as error:
        raise UnsupportedModelError(f"the configuration has no '{error.args[0]}', which '{text}' needs", "check config.json") from error
    except (TypeError, ZeroDivisionError, AttributeError) as error:
        raise UnsupportedModelError(f"'{text}' cannot be computed from the configuration: {error}", "check config.json") from error


@cache
def _parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return names[node.id]
    if isinstance(node, ast.Attribute):
        return _value(node.value, names)[node.attr]
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left, names), _value(node.right, names))
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return _OPERATORS[type(node.ops[0])](_value(node.left, names), _value(node.comparators[0], names))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return not _value(node.operand, names)
    if isinstance(node, ast.BoolOp):
        stops_at = isinstance(node.op, ast.Or)
        value: Any = not stops_at
        for part in node.values:
            value = _value(part, names)
            if bool(value) == stops_at:
                return value
        return value
    raise TypeError(f"{type(node).__name__} has no meaning in a formula")
