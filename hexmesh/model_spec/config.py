"""Reads of a config.json that say which key is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hexmesh.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Config:
    """Typed reads of a config with its family's defaults and other spellings of keys."""

    raw: Mapping[str, Any]
    defaults: Mapping[str, Any]
    spellings: Mapping[str, str]
    """Common key -> the family's own."""

    def value(self, key: str) -> Any:
        for spelling in (self.spellings.get(key, key), key):
            if spelling in self.raw:
                return self.raw[spelling]
        return self.defaults.get(key)

    def count(self, key: str, default: int | None = None) -> int:
        value = self.value(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidInput(f"config.json: {key} is {value!r}, not a positive integer")
        return value

    def flag(self, key: str | bool) -> bool:
        value = key if isinstance(key, bool) else self.value(key)
        if not isinstance(value, bool | None):
            raise InvalidInput(f"config.json: {key} is {value!r}, neither true nor false")
        return bool(value)
