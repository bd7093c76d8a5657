"""Hypothesis strategies for any wire type, made from the type itself, so that a new message is fuzzed unasked."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import strategies as st
from msgspec import inspect

_LEAST, _MOST = -(2**63), 2**64 - 1
WORDS = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=12)


def any_of(kind: object, *, words: st.SearchStrategy[str] = WORDS) -> st.SearchStrategy[Any]:
    """Values of a struct type or a union of them, within the bounds that its fields declare.

    `words` gives the strings: a few names that a receiver knows reach deeper than random text.
    """
    return _strategy(inspect.type_info(kind), words)


def message_types(union: object) -> list[type[msgspec.Struct]]:
    """The struct types of a union of messages."""
    found = inspect.type_info(union)
    members = found.types if isinstance(found, inspect.UnionType) else (found,)
    return [member.cls for member in members if isinstance(member, inspect.StructType)]


def _strategy(kind: inspect.Type, words: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    match kind:
        case inspect.StructType():
            fields = {one.name: _strategy(one.type, words) for one in kind.fields}
            return st.builds(kind.cls, **fields)
        case inspect.UnionType():
            return st.one_of(*(_strategy(one, words) for one in kind.types))
        case inspect.ListType():
            return st.lists(_strategy(kind.item_type, words), max_size=min(3, kind.max_length or 3))
        case inspect.VarTupleType():
            return st.lists(_strategy(kind.item_type, words), max_size=3).map(tuple)
        case inspect.TupleType():
            return st.tuples(*(_strategy(one, words) for one in kind.item_types))
        case inspect.DictType():
            return st.dictionaries(
                _strategy(kind.key_type, words), _strategy(kind.value_type, words), max_size=3
            )
        case inspect.IntType():
            least = _LEAST if kind.ge is None else kind.ge
            most = _MOST if kind.le is None else kind.le
            most = most if kind.lt is None else min(most, kind.lt - 1)
            few = [n for n in (0, 1, 2, 7, least, most) if least <= n <= most]
            return st.sampled_from(few) | st.integers(least, most)
        case inspect.FloatType():
            return st.floats(kind.ge, kind.le, allow_nan=False)
        case inspect.StrType():
            return words
        case inspect.BytesType():
            return st.binary(min_size=kind.min_length or 0, max_size=max(kind.min_length or 0, 12))
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType():
            return st.none()
        case inspect.LiteralType():
            return st.sampled_from(kind.values)
        case _:
            raise NotImplementedError(f"no strategy for {kind}")
