"""`hexmesh join`'s settings: which place wins, what is refused, and with what words."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from daemon.cli import cli
from daemon.config import (
    JoinOptions,
    default_state_dir,
    find_config_file,
    join_options_from_text,
    parse_advertised,
    parse_cpus,
    parse_devices,
    parse_host_port,
)
from hexmesh.errors import InvalidInput

STATE = "/state"


def options(**texts: str | bool) -> JoinOptions:
    return join_options_from_text({"state_dir": STATE, **texts})


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[JoinOptions]:
    """The options of each `join`, which ends at once with exit code 0."""
    seen: list[JoinOptions] = []

    async def run_node(given: JoinOptions, on_up: object) -> int:
        seen.append(given)
        return 0

    node: Any = types.ModuleType("daemon.node")
    node.run_node = run_node
    monkeypatch.setitem(sys.modules, "daemon.node", node)
    monkeypatch.setattr("daemon.terminal.logs.set_up_logging", lambda log_format: None)
    for name in ("HEXMESH_STATE_DIR", "HEXMESH_TOKEN", "HEXMESH_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    return seen


def join(*args: str, env: dict[str, str] | None = None, toml: str = "", folder: Path) -> None:
    config = folder / "hexmesh.toml"
    config.write_text(toml)
    environ = {"HEXMESH_STATE_DIR": str(folder)} | (env or {})
    result = CliRunner().invoke(cli, ["--config", str(config), "join", *args], env=environ)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output


def test_defaults() -> None:
    expected = JoinOptions(state_dir=Path(STATE), name="here")
    assert options(name="here") == expected
    assert (expected.http_port, expected.peer_port, expected.dht_port) == (7700, 7701, 7702)
    assert (expected.http_listen, expected.device, expected.min_nodes) == ("127.0.0.1", ("auto",), 1)
    assert expected.founds


def test_every_flag_arrives(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret\n")
    actual = options(
        model="org/model", served_name="m", name="n", site="s", device="cpu,cpu", threads="2",
        cpu_affinity="0-1,4", memory="2GiB", dtype="bfloat16", min_nodes="3", ready_file="/r",
        log_format="json", http_port="1", peer_port="2", dht_port="0", listen="10.0.0.1",
        advertise="1.2.3.4:5", http_listen="0.0.0.0", api_key_file=str(key), metrics_alias="vllm",
    )  # fmt: skip
    expected = JoinOptions(
        state_dir=Path(STATE), model="org/model", served_name="m", name="n", site="s", device=("cpu", "cpu"),
        threads=2,
        cpu_affinity=(0, 1, 4), memory_bytes=2 * 2**30, dtype="bfloat16", min_nodes=3, ready_file=Path("/r"),
        log_format="json", http_port=1, peer_port=2, dht_port=0, listen="10.0.0.1", advertise="1.2.3.4:5",
        http_listen="0.0.0.0", api_key_file=key, metrics_alias="vllm",
    )  # fmt: skip
    assert actual == expected


def test_flag_beats_variable_beats_file_beats_default(joined: list[JoinOptions], tmp_path: Path) -> None:
    toml = 'name = "file"\nthreads = 3'
    join(folder=tmp_path, toml="")
    join(folder=tmp_path, toml=toml)
    join(folder=tmp_path, toml=toml, env={"HEXMESH_NAME": "variable"})
    join("--name", "flag", folder=tmp_path, toml=toml, env={"HEXMESH_NAME": "variable"})
    assert [given.name for given in joined][1:] == ["file", "variable", "flag"]
    assert [given.threads for given in joined] == [None, 3, 3, 3]


def test_a_verbs_table_beats_the_top_of_the_file(joined: list[JoinOptions], tmp_path: Path) -> None:
    join(
        folder=tmp_path, toml='name = "top"\ndevice = ["cpu", "cpu"]\n[join]\nname = "table"\nno-auth = true'
    )
    assert (joined[0].name, joined[0].device, joined[0].no_auth) == ("table", ("cpu", "cpu"), True)


def test_a_token_file_flag_beats_a_token_variable(joined: list[JoinOptions], tmp_path: Path) -> None:
    (tmp_path / "t").write_text("from-file\n")
    join("--token-file", str(tmp_path / "t"), folder=tmp_path, env={"HEXMESH_TOKEN": "from-variable"})
    assert joined[0].token == "from-file"
    with pytest.raises(InvalidInput, match="--token and --token-file contradict"):
        join("--token-file", str(tmp_path / "t"), "--token", "x", folder=tmp_path)


def test_the_token_is_not_shown() -> None:
    assert "s3cret" not in repr(options(token="s3cret", peer="h:1"))


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("nmae = 1", "unknown key nmae; did you mean name?"),
        ("[jion]\nname = 1", "unknown key [jion]; did you mean join?"),
        ("[join]\ntimeout = 1", "unknown key timeout"),
        ("name = ", "is not TOML"),
        ("name = 2020-01-01", "a value that no flag takes"),
    ],
)
def test_a_wrong_file_is_refused(joined: list[JoinOptions], tmp_path: Path, toml: str, words: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        join(folder=tmp_path, toml=toml)
    assert words in caught.value.one_line()


@pytest.mark.parametrize(
    "ports", [({"peer_port": "9000"}, 9001), ({"peer_port": "0"}, 0), ({"http_port": "1"}, 7702)]
)
def test_the_dht_port_follows_the_peer_port(ports: tuple[dict[str, str], int]) -> None:
    texts, dht_port = ports
    assert options(**texts).dht_port == dht_port


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"http_listen": "0.0.0.0"}, "--api-key-file F, or --no-auth"),
        ({"http_listen": "::"}, "--api-key-file F, or --no-auth"),
        ({"http_listen": "example.org"}, "--http-listen: 'example.org' is not an IP address"),
        ({"api_key_file": "/no/such/file"}, "the API key file /no/such/file cannot be read: No such file"),
        ({"token_file": "/no/such/file"}, "the token file /no/such/file cannot be read: No such file"),
        ({"peer": "10.0.0.1"}, "--peer: '10.0.0.1' is not HOST:PORT"),
        ({"http_port": "7701"}, "two ports are the same"),
        ({"peer_port": "70000"}, "not a port in 0..65535"),
        ({"peer_port": "65535"}, "give --dht-port too"),
        ({"memory": "1023KiB"}, "1047552 bytes is less than 1048576"),
        ({"memory": "2 apples"}, "--memory: unknown unit 'apples'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"device": "auto,cpu"}, "mixes auto with others"),
        ({"device": "cuda:1,cuda:1"}, "names a GPU twice"),
        ({"threads": "0"}, "--threads: '0' is not a whole number of at least 1"),
        ({"cpu_affinity": "0,0"}, "--cpu-affinity"),
        ({"dtype": "int4"}, "--dtype: 'int4' is not one of float32, bfloat16, float16"),
        ({"log_format": "xml"}, "--log-format: 'xml' is not one of text, json"),
        ({"advertise": "name:1"}, "--advertise: 'name' is not an IP address"),
        ({"name": " "}, "the node's name is empty"),
    ],
)
def test_nonsense_is_refused_with_a_reason(texts: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        options(**texts)
    assert words in caught.value.one_line()


def test_open_http_is_fine_when_meant_and_keys_contradict_it(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret")
    assert options(http_listen="0.0.0.0", no_auth=True).no_auth
    with pytest.raises(InvalidInput, match="contradict"):
        options(http_listen="0.0.0.0", no_auth=True, api_key_file=str(key))
    assert options(http_listen="localhost").http_listen == "127.0.0.1"
    assert options(http_listen="::1").http_listen == "::1"


def test_an_empty_secret_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("\n")
    with pytest.raises(InvalidInput, match="is empty"):
        options(api_key_file=str(tmp_path / "key"))


def test_lists_and_addresses() -> None:
    assert parse_devices("cuda") == ("cuda:0",)
    assert parse_devices("cuda:0,cuda:1") == ("cuda:0", "cuda:1")
    assert parse_cpus("0-2,7") == (0, 1, 2, 7)
    assert parse_host_port("[fd00::1]:7701") == "[fd00::1]:7701"
    assert parse_advertised("[fd00::1]:7701") == "[fd00::1]:7701"
    with pytest.raises(InvalidInput):
        parse_host_port("fd00::1:7701")


def test_where_the_state_folder_is() -> None:
    assert default_state_dir({"HEXMESH_STATE_DIR": "/a"}) == Path("/a")
    assert default_state_dir({"XDG_STATE_HOME": "/b", "HOME": "/h"}) == Path("/b/hexmesh")
    assert default_state_dir({"HOME": "/h"}) == Path("/h/.local/state/hexmesh")


def test_where_the_settings_file_is(tmp_path: Path) -> None:
    environ = {"XDG_CONFIG_HOME": str(tmp_path / "config")}
    assert find_config_file(environ, tmp_path) is None
    users = tmp_path / "config" / "hexmesh" / "hexmesh.toml"
    users.parent.mkdir(parents=True)
    users.touch()
    assert find_config_file(environ, tmp_path) == users
    (tmp_path / "hexmesh.toml").touch()
    assert find_config_file(environ, tmp_path) == tmp_path / "hexmesh.toml"


@pytest.mark.parametrize("flag", ["name", "site", "served_name"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x" * 257, "has 257 characters, over 256"),
        ("a\x1b[2Jb", "cannot be printed"),
        ("a\nb", "cannot be printed"),
    ],
)
def test_names_that_spoil_logs_and_terminals_are_refused(flag: str, text: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said) as refusal:
        options(**{flag: text})
    assert f"--{flag.replace('_', '-')} " in refusal.value.message
    assert options(**{flag: "x" * 256}) is not None
