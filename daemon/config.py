"""What `hexmesh join` was told: flags, HEXMESH_* variables and hexmesh.toml, checked and in SI units.

`JoinOptions` is usable the moment it exists. Text from the outside becomes one through
`join_options_from_text`; code and tests may construct it directly.
"""

from __future__ import annotations

import difflib
import ipaddress
import socket
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar, cast

from hexmesh.errors import InvalidInput
from hexmesh.units import parse_bytes

LogFormat = Literal["text", "json"]
DtypeName = Literal["float32", "bfloat16", "float16"]
T = TypeVar("T")

HTTP_PORT = 7700
PEER_PORT = 7701
DHT_PORT = 7702
CONFIG_NAME = "hexmesh.toml"

_MIN_MEMORY_BYTES = 2**20
_MAX_NAME = 256
_DTYPES = ("float32", "bfloat16", "float16")
_LOG_FORMATS = ("text", "json")
_METRICS_ALIASES = ("vllm",)


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinOptions:
    """One daemon's settings. `peer` or `token` set means joining, neither means founding or rejoining."""

    state_dir: Path
    model: str | None = None
    served_name: str | None = None
    peer: str | None = None
    """HOST:PORT of any node of the mesh; may be None when the token carries an address."""
    token: str | None = field(default=None, repr=False)
    """The join token's text, from --token or read from `token_file`."""
    token_file: Path | None = None
    name: str = field(default_factory=lambda: host_name())
    site: str = "default"
    device: tuple[str, ...] = ("auto",)
    """("auto",) or one entry a device, such as ("cpu", "cpu") or ("cuda:0", "cuda:1")."""
    threads: int | None = None
    """Compute threads of each CPU device; None leaves it to the node."""
    cpu_affinity: tuple[int, ...] | None = None
    memory_bytes: int | None = None
    """The planner's budget on each device; None means what is free."""
    weights_cache_bytes: int | None = None
    """Cap of the cache of weights fetched from peers; None means 80 % of what is free for it."""
    dtype: DtypeName | None = None
    """None means the model's own."""
    min_nodes: int = 1
    ready_file: Path | None = None
    log_format: LogFormat = "text"
    http_port: int = HTTP_PORT
    peer_port: int = PEER_PORT
    dht_port: int = DHT_PORT
    listen: str | None = None
    """Address of the peer and DHT ports; None means the one by which this host is reached."""
    advertise: str | None = None
    """IP:PORT under which others reach the peer port."""
    http_listen: str = "127.0.0.1"
    api_key_file: Path | None = None
    no_auth: bool = False
    metrics_alias: str | None = None

    def __post_init__(self) -> None:
        self._check_names()
        if not self.device or ("auto" in self.device and len(self.device) > 1):
            raise InvalidInput(
                f"--device {','.join(self.device)!r} mixes auto with others",
                next_step="write auto, or a list such as cuda:0,cuda:1",
            )
        if self.memory_bytes is not None and self.memory_bytes < _MIN_MEMORY_BYTES:
            raise InvalidInput(
                f"--memory {self.memory_bytes} bytes is less than {_MIN_MEMORY_BYTES}",
                next_step="give 1MiB or more",
            )
        self._check_ports()
        self._check_http_is_guarded()

    @property
    def founds(self) -> bool:
        """Whether a node without a stored membership would found a mesh."""
        return self.peer is None and self.token is None

    def _check_names(self) -> None:
        """Names end up in others' logs and terminals."""
        if not self.name.strip():
            raise InvalidInput("the node's name is empty", next_step="give --name N")
        for flag, name in (
            ("--name", self.name),
            ("--site", self.site),
            ("--served-name", self.served_name or ""),
        ):
            if len(name) > _MAX_NAME:
                raise InvalidInput(
                    f"{flag} has {len(name)} characters, over {_MAX_NAME}", next_step="give a shorter one"
                )
            if not name.isprintable():
                raise InvalidInput(
                    f"{flag} {name!r} has characters that cannot be printed", next_step="give another"
                )

    def _check_ports(self) -> None:
        ports = {"--http-port": self.http_port, "--peer-port": self.peer_port, "--dht-port": self.dht_port}
        for flag, port in ports.items():
            if not 0 <= port <= 65535:
                raise InvalidInput(f"{flag} {port} is not in 0..65535", next_step="0 picks a free port")
        # The HTTP port may be on another address, but two services on one number are a trap for people.
        fixed = [port for port in ports.values() if port]
        if len(set(fixed)) < len(fixed):
            shown = ", ".join(f"{flag} {port}" for flag, port in ports.items())
            raise InvalidInput(f"two ports are the same: {shown}", next_step="give each its own, or 0")

    def _check_http_is_guarded(self) -> None:
        if self.api_key_file is not None and self.no_auth:
            raise InvalidInput(
                "--api-key-file and --no-auth contradict each other", next_step="give one of them"
            )
        if not is_loopback(self.http_listen) and self.api_key_file is None and not self.no_auth:
            raise InvalidInput(
                f"HTTP on {self.http_listen} would be open to everyone who reaches it",
                next_step="give --api-key-file F, or --no-auth if that is meant",
            )


def join_options_from_text(texts: Mapping[str, str | bool | None]) -> JoinOptions:
    """Options from flags' values as written; None or absent means the default. Raises InvalidInput."""
    assert set(texts) <= {*_FIELDS, "token_file"}, texts.keys()
    options: dict[str, object] = {}
    for name, parse in _FIELDS.items():
        value = texts.get(name)
        if value is None or value == "":
            continue
        options[_RENAMED.get(name, name)] = value if isinstance(value, bool) else _parsed(name, parse, value)
    if (token_file := texts.get("token_file")) and "token" not in options:
        options["token_file"] = Path(str(token_file))
        options["token"] = read_secret(Path(str(token_file)), what="the token file")
    if "peer_port" in options and "dht_port" not in options:
        options["dht_port"] = _dht_port_beside(cast(int, options["peer_port"]))
    if (api_key_file := options.get("api_key_file")) is not None:
        read_secret(cast(Path, api_key_file), what="the API key file")
    return JoinOptions(**options)  # type: ignore[arg-type]


def default_state_dir(environ: Mapping[str, str]) -> Path:
    """Where a daemon keeps its identity and membership unless told otherwise."""
    if told := environ.get("HEXMESH_STATE_DIR"):
        return Path(told)
    base = environ.get("XDG_STATE_HOME") or str(Path(environ.get("HOME") or Path.home()) / ".local" / "state")
    return Path(base) / "hexmesh"


def find_config_file(environ: Mapping[str, str], cwd: Path) -> Path | None:
    """./hexmesh.toml, else the user's own in the XDG configuration folder, else None."""
    base = environ.get("XDG_CONFIG_HOME") or str(Path(environ.get("HOME") or Path.home()) / ".config")
    for path in (cwd / CONFIG_NAME, Path(base) / "hexmesh" / CONFIG_NAME):
        if path.is_file():
            return path
    return None


def read_config_file(path: Path, known: Mapping[str, set[str]]) -> dict[str, dict[str, str | bool]]:
    """Flag values by verb. Top-level keys go to every verb with such a flag, a `[verb]` table to that verb.

    `known` maps each verb to its flags' names. Raises InvalidInput for what is no TOML or names no flag.
    """
    document = _read_toml(path)
    shared: dict[str, str | bool] = {}
    tables: dict[str, dict[str, str | bool]] = {}
    for key, value in document.items():
        name = key.replace("-", "_")
        if isinstance(value, dict):
            if name not in known:
                raise _unknown_key(path, f"[{key}]", set(known))
            tables[name] = _flag_values(path, value, known[name])
        else:
            shared |= _flag_values(path, {key: value}, set().union(*known.values()))
    return {
        verb: {name: value for name, value in shared.items() if name in flags} | tables.get(verb, {})
        for verb, flags in known.items()
    }


def read_secret(path: Path, *, what: str) -> str:
    """The first token or key of a file, past blank lines and comments. Raises InvalidInput."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InvalidInput(f"{what} {path} cannot be read: {reason}", next_step="check the path") from None
    if secret := next((line for line in lines if line and not line.startswith("#")), ""):
        return secret
    raise InvalidInput(f"{what} {path} is empty", next_step="write the secret into it")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    return ipaddress.ip_address(host).is_loopback


def host_name() -> str:
    """This machine's name without its domain."""
    return socket.gethostname().split(".")[0] or "node"


def parse_ip(text: str) -> str:
    """An IP address as given; `localhost` means 127.0.0.1. Raises InvalidInput."""
    if text == "localhost":
        return "127.0.0.1"
    try:
        return str(ipaddress.ip_address(text.strip("[]")))
    except ValueError:
        raise InvalidInput(f"{text!r} is not an IP address", next_step="write one such as 10.0.0.1") from None


def parse_host_port(text: str) -> str:
    """HOST:PORT or [IPv6]:PORT as given. Raises InvalidInput."""
    host, colon, port = text.rpartition(":")
    is_bare_v6 = ":" in host and not (host.startswith("[") and host.endswith("]"))
    if not colon or not host or is_bare_v6 or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise InvalidInput(f"{text!r} is not HOST:PORT", next_step="write one such as 10.0.0.1:7701")
    return text


def parse_advertised(text: str) -> str:
    """IP:PORT as given. Raises InvalidInput."""
    parse_ip(parse_host_port(text).rpartition(":")[0])
    return text


def parse_devices(text: str) -> tuple[str, ...]:
    """Devices from "auto", "cpu,cpu" or "cuda:0,cuda:1"; "cuda" means cuda:0. Raises InvalidInput."""
    devices = tuple(_parse_device(part.strip()) for part in text.split(","))
    gpus = [device for device in devices if device.startswith("cuda")]
    if len(set(gpus)) < len(gpus):
        raise InvalidInput(f"{text!r} names a GPU twice", next_step="name each GPU once")
    return devices


def parse_cpus(text: str) -> tuple[int, ...]:
    """CPU numbers from "0,1" or "0-3,8". Raises InvalidInput."""
    cpus: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise InvalidInput(f"{text!r} is not a list of CPUs", next_step="write one such as 0,1 or 0-3")
        cpus.extend(range(int(first), int(last or first) + 1))
    if not cpus or len(set(cpus)) < len(cpus):
        raise InvalidInput(f"{text!r} names no CPU or one twice", next_step="write a list such as 0,1")
    return tuple(cpus)


def parse_count(text: str, *, least: int) -> int:
    """A whole number of at least `least`. Raises InvalidInput."""
    if not text.strip().isdecimal() or int(text) < least:
        raise InvalidInput(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def _parse_device(text: str) -> str:
    kind, colon, index = text.partition(":")
    if text in ("auto", "cpu"):
        return text
    if kind == "cuda" and (not colon or index.isdecimal()):
        return f"cuda:{int(index or 0)}"
    raise InvalidInput(f"unknown device {text!r}", next_step="write auto, cpu, cpu,cpu or cuda:0,cuda:1")


def _parse_port(text: str) -> int:
    if not text.strip().isdecimal() or int(text) > 65535:
        raise InvalidInput(f"{text!r} is not a port in 0..65535", next_step="0 picks a free port")
    return int(text)


def _parse_positive(text: str) -> int:
    return parse_count(text, least=1)


def _one_of(choices: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise InvalidInput(f"{text!r} is not one of {', '.join(choices)}")
        return text

    return parse


def _parse_flag(text: str) -> bool:
    return _one_of(("true", "false"))(text) == "true"


def _dht_port_beside(peer_port: int) -> int:
    if peer_port == 65535:
        raise InvalidInput(
            "--peer-port 65535 leaves no port above it for the DHT", next_step="give --dht-port too"
        )
    return peer_port + 1 if peer_port else 0


def _parsed(name: str, parse: Callable[[str], T], text: str) -> T:
    try:
        return parse(text)
    except InvalidInput as error:
        flag = "--" + name.replace("_", "-")
        raise InvalidInput(f"{flag}: {error.message}", code=error.code, next_step=error.next_step) from None


def _read_toml(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}", next_step="check --config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} is not TOML: {error}", next_step="mend the file") from None


def _flag_values(path: Path, table: Mapping[str, object], known: set[str]) -> dict[str, str | bool]:
    values: dict[str, str | bool] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known:
            raise _unknown_key(path, key, known)
        match value:
            case bool() | str():
                values[name] = value
            case int() | float():
                values[name] = str(value)
            case list() if all(isinstance(item, (str, int)) for item in value):
                values[name] = ",".join(str(item) for item in value)
            case _:
                raise InvalidInput(
                    f"{path}: {key} has a value that no flag takes", next_step="write text or a number"
                )
    return values


def _unknown_key(path: Path, key: str, known: set[str]) -> InvalidInput:
    near = difflib.get_close_matches(key.strip("[]").replace("-", "_"), sorted(known), n=1)
    next_step = (
        f"did you mean {near[0]}?" if near else "keys are the names of flags, tables the names of verbs"
    )
    return InvalidInput(f"{path}: unknown key {key}", next_step=next_step)


_RENAMED = {"memory": "memory_bytes", "weights_cache": "weights_cache_bytes"}
_FIELDS: dict[str, Callable[[str], object]] = {
    "state_dir": lambda text: Path(text).expanduser().absolute(),
    "model": str,
    "served_name": str,
    "peer": parse_host_port,
    "token": str.strip,
    "name": str,
    "site": str,
    "device": parse_devices,
    "threads": _parse_positive,
    "cpu_affinity": parse_cpus,
    "memory": parse_bytes,
    "weights_cache": parse_bytes,
    "dtype": _one_of(_DTYPES),
    "min_nodes": _parse_positive,
    "ready_file": lambda text: Path(text).expanduser().absolute(),
    "log_format": _one_of(_LOG_FORMATS),
    "http_port": _parse_port,
    "peer_port": _parse_port,
    "dht_port": _parse_port,
    "listen": parse_ip,
    "advertise": parse_advertised,
    "http_listen": parse_ip,
    "api_key_file": lambda text: Path(text).expanduser().absolute(),
    "no_auth": _parse_flag,
    "metrics_alias": _one_of(_METRICS_ALIASES),
}
