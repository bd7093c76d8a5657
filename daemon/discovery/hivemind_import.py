"""Imports what we use of hivemind without the rest of it.

`import hivemind` brings torch and all of its training code: 1.2 s and 270 MB in every daemon, for a DHT that
needs neither. Its DHT modules themselves import only light ones, so the packages above them are put in place
as empty shells with the few names that the DHT modules take from them: 0.15 s and under 30 MB. Where hivemind has
moved on and that fails, the whole package is imported after all. It can go when hivemind's packages import
lazily.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import threading
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from hexmesh.errors import NotReady

log = logging.getLogger("hexmesh.dht")

_SHELLS = ("hivemind", "hivemind.utils", "hivemind.dht")
_UTILS_NAMES = {
    "hivemind.utils.logging": ("get_logger",),
    "hivemind.utils.serializer": ("MSGPackSerializer", "SerializerBase"),
    "hivemind.utils.timed_storage": (
        "DHTExpiration",
        "MAX_DHT_TIME_DISCREPANCY_SECONDS",
        "TimedStorage",
        "ValueWithExpiration",
        "get_dht_time",
    ),
}
_ours = threading.Lock()


def import_dht_node() -> ModuleType:
    """The module `daemon.discovery.dht_node`. Takes 0.15 s or more: call it in a thread. Raises NotReady."""
    with _ours:
        if "hivemind" not in sys.modules:
            _import_light()
        try:
            module = importlib.import_module("daemon.discovery.dht_node")
        except ImportError as error:
            raise NotReady(
                f"hivemind cannot be imported: {error}", code="no_hivemind", next_step="pip install hivemind"
            ) from error
        _quieten()
        return module


def _import_light() -> None:
    try:
        _put_shells()
        importlib.import_module("hivemind.dht.node")
    except (ImportError, AttributeError) as error:
        log.info("hivemind is imported whole, with torch, because its parts cannot be: %s", error)
        for name in [name for name in sys.modules if name.partition(".")[0] == "hivemind"]:
            del sys.modules[name]


def _put_shells() -> None:
    spec = importlib.util.find_spec("hivemind")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("it is not installed")
    root = Path(spec.submodule_search_locations[0])
    for name in _SHELLS:
        shell_spec = ModuleSpec(name, None, is_package=True)
        shell_spec.submodule_search_locations = [str(root.joinpath(*name.split(".")[1:]))]
        shell = importlib.util.module_from_spec(shell_spec)
        sys.modules[name] = shell
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, shell)
    for source, names in _UTILS_NAMES.items():
        module = importlib.import_module(source)
        for taken in names:
            setattr(sys.modules["hivemind.utils"], taken, getattr(module, taken))


def _quieten() -> None:
    """Send hivemind's log lines where ours go, and take back that it renames WARNING for everybody."""
    hivemind_logging = importlib.import_module("hivemind.utils.logging")
    hivemind_logging.use_hivemind_log_handler("nowhere")
    logging.getLogger("hivemind").setLevel(logging.WARNING)
    logging.addLevelName(logging.WARNING, "WARNING")
