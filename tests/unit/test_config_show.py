"""`hexmesh config show`: every setting of join, its value and the place that it comes from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from daemon.cli import cli
from daemon.verbs.join import join

SECRET = "hm1_very-secret"

Row = tuple[Any, str, str | None]


@pytest.fixture(autouse=True)
def _own_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("HEXMESH_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.chdir(tmp_path)


def show(*args: str, env: dict[str, str] | None = None) -> dict[str, Row]:
    """Rows by setting: value, kind of origin, its place."""
    result = CliRunner().invoke(cli, ["config", "show", "-o", "json", *args], env=env)
    assert result.exit_code == 0, result.output
    assert SECRET not in result.output
    return {
        row["name"]: (row["value"], row["origin"]["kind"], row["origin"]["place"])
        for row in json.loads(result.output)["settings"]
    }


def test_every_setting_of_join_is_there_by_default(tmp_path: Path) -> None:
    rows = show()

    assert list(rows) == [param.name for param in join.params if isinstance(param, click.Option)]
    assert {kind for _, kind, _ in rows.values()} == {"default"}
    assert rows["http_port"] == (7700, "default", None)
    assert rows["state_dir"] == (str(tmp_path / ".local/state/hexmesh"), "default", None)
    assert rows["model"] == (None, "default", None)
    assert rows["device"] == ("auto", "default", None)


def test_each_place_is_named_and_the_stronger_one_wins(tmp_path: Path) -> None:
    file = tmp_path / "hexmesh.toml"
    file.write_text('site = "file"\nname = "file"\n[join]\nmemory = "2GiB"\nthreads = 3\nname = "table"\n')
    rows = show(
        *("--site", "flag"),
        env={"HEXMESH_SITE": "variable", "HEXMESH_NAME": "variable", "HEXMESH_DEVICE": "cpu"},
    )

    assert rows["site"] == ("flag", "flag", "--site")
    assert rows["name"] == ("variable", "variable", "HEXMESH_NAME")
    assert rows["device"] == ("cpu", "variable", "HEXMESH_DEVICE")
    assert rows["memory"] == (2 * 2**30, "file", str(file))
    assert rows["threads"] == (3, "file", str(file))
    assert show()["name"] == ("table", "file", str(file))


def test_a_file_named_by_flag_or_variable(tmp_path: Path) -> None:
    file = tmp_path / "other.toml"
    file.write_text('listen = "10.0.0.1"\n')
    result = CliRunner().invoke(cli, ["--config", str(file), "config", "show", "-o", "json"])

    assert json.loads(result.output)["file"] == str(file)
    assert show(env={"HEXMESH_CONFIG": str(file)})["listen"] == ("10.0.0.1", "file", str(file))
    assert json.loads(CliRunner().invoke(cli, ["config", "show", "-o", "json"]).output)["file"] is None


def test_what_follows_from_another_setting() -> None:
    assert show("--peer-port", "9000")["dht_port"] == (9001, "default", "beside --peer-port")
    assert show(env={"XDG_STATE_HOME": "/x"})["state_dir"] == (
        "/x/hexmesh",
        "variable",
        "XDG_STATE_HOME",
    )


def test_secrets_are_hidden_wherever_they_come_from(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(SECRET + "\n")
    (tmp_path / "hexmesh.toml").write_text(f'[join]\ntoken = "{SECRET}"\n')

    assert show()["token"] == ("(hidden)", "file", str(tmp_path / "hexmesh.toml"))
    assert show(env={"HEXMESH_TOKEN": SECRET})["token"] == ("(hidden)", "variable", "HEXMESH_TOKEN")
    rows = show("--token-file", str(file))
    assert rows["token"] == (None, "overruled", "--token-file")
    assert rows["token_file"] == (str(file), "flag", "--token-file")


def test_a_wrong_value_is_shown_with_its_place_and_refused(tmp_path: Path) -> None:
    (tmp_path / "hexmesh.toml").write_text('http_port = "many"\n')
    result = CliRunner().invoke(cli, ["config", "show", "-o", "json"])

    rows = {row["name"]: row for row in json.loads(result.output)["settings"]}
    assert rows["http_port"]["value"] == "many"
    assert rows["http_port"]["origin"] == {"kind": "file", "place": str(tmp_path / "hexmesh.toml")}
    assert "--http-port: 'many' is not a port" in str(result.exception)


def test_the_table_is_for_people() -> None:
    result = CliRunner().invoke(cli, ["config", "show", "--memory", "2GiB", "--no-auth", "--site", "tokyo"])
    lines = {line.split()[0]: line.split()[1:] for line in result.output.splitlines()}

    assert lines["file:"] == ["none"]
    assert lines["--memory"] == ["2.0", "GiB", "flag", "--memory"]
    assert lines["--no-auth"] == ["true", "flag", "--no-auth"]
    assert lines["--site"] == ["tokyo", "flag", "--site"]
    assert lines["--token"] == ["-", "default"]
