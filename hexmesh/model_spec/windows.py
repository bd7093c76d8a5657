"""Which layers see only a window of the last tokens: the rule of each family."""

from __future__ import annotations

from collections.abc import Callable

from hexmesh.errors import InvalidInput
from hexmesh.model_spec.config import Config

Window = Callable[[Config, int], int | None]
"""Of a config and a layer's index: how many tokens the layer sees, None for all."""


def no_window(config: Config, layer: int) -> int | None:
    """The layer sees everything."""
    return None


def windows(slides: Callable[[Config, int], bool], *, switch: str = "", obeys_types: bool = True) -> Window:
    """A window of "sliding_window" tokens on layers that `slides` names, unless "layer_types" says otherwise.

    `switch` is the key that must be true for any window to be; `obeys_types` is false where transformers
    ignores "layer_types".
    """

    def window(config: Config, layer: int) -> int | None:
        if (switch and not config.flag(switch)) or config.value("sliding_window") is None:
            return None
        types = config.value("layer_types") if obeys_types else None
        if types is not None and (not isinstance(types, list) or len(types) <= layer):
            raise InvalidInput("config.json: layer_types is no list with one entry a layer")
        is_sliding = slides(config, layer) if types is None else types[layer] == "sliding_attention"
        return config.count("sliding_window") if is_sliding else None

    return window


def alternate(config: Config, layer: int) -> bool:
    """The first layer, the third, and so on."""
    return layer % 2 == 0


def without_rope(config: Config, layer: int) -> bool:
    """Layers that do not rotate by position: those with a 0 in "no_rope_layers", else every n-th."""
    rotates = config.value("no_rope_layers")
    if isinstance(rotates, list) and layer < len(rotates):
        return not rotates[layer]
    return (layer + 1) % config.count("no_rope_layer_interval") == 0


every_layer = windows(lambda config, layer: True, obeys_types=False)
