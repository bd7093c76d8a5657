"""The state folder: private, locked, replaced as a whole, and silent about secrets."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from daemon.peering.tls import client_context, server_context
from daemon.runfile import ADMIN_KEY_FILE
from daemon.trust.admission import found_mesh
from daemon.trust.state import Membership, StateFolder, StateInUse
from hexmesh.errors import HexmeshError, InvalidInput
from hexmesh.identity.tokens import TokenLedger
from hexmesh.wire.peering import MemberAddress, ModelReference

NOW = datetime(2026, 5, 1, tzinfo=UTC)
MODEL = ModelReference(name="m", model_id="ab" * 32, root="/models/m")
LEDGER = TokenLedger().mint(b"s" * 20, now_unix_s=0, ttl_s=10, uses=2)

_TAKE = "import sys; from pathlib import Path; from daemon.trust.state import StateFolder\n"


def found(state: StateFolder) -> Membership:
    return found_mesh(state, state.node_key(), "12D3KooW", MODEL, "float32", NOW)


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


def test_everything_is_found_again(tmp_path: Path) -> None:
    with StateFolder(tmp_path / "s") as state:
        key, admin_key, membership = state.node_key(), state.admin_key(), found(state)
        peers = [MemberAddress(node_id="f" * 40, name="n", address="h:1", dht_maddrs=["/ip4/1"])]
        membership = Membership(**{**_fields(membership), "members": peers})
        state.save_membership(membership)
        state.save_ledger(LEDGER)
        state.save_highest_term(7)
        authority = state.authority()
    with StateFolder(tmp_path / "s") as again:
        assert again.node_key().node_id == key.node_id
        assert again.admin_key() == admin_key
        assert again.membership() == membership
        assert again.ledger() == LEDGER
        assert again.highest_term() == 7
        found_again = again.authority()
        files = again.tls_files(membership)

    assert authority is not None
    assert found_again is not None
    assert found_again.mesh_id == authority.mesh_id == membership.mesh_id
    server_context(files)
    client_context(files)


def _fields(membership: Membership) -> dict[str, object]:
    return {name: getattr(membership, name) for name in membership.__struct_fields__}


def test_a_fresh_folder_is_empty(tmp_path: Path) -> None:
    with StateFolder(tmp_path / "deep" / "s") as state:
        assert (state.membership(), state.authority(), state.ledger(), state.highest_term()) == (
            None,
            None,
            TokenLedger(),
            0,
        )


def test_only_the_owner_reads_it(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir(mode=0o755)
    former_umask = os.umask(0)
    try:
        with StateFolder(folder) as state:
            found(state)
            state.admin_key()
            state.save_ledger(LEDGER)
            state.save_highest_term(1)
    finally:
        os.umask(former_umask)

    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert set(modes(folder).values()) == {0o600}
    assert not [name for name in modes(folder) if "unfinished" in name]


def test_forgetting_deletes_the_membership_and_keeps_the_node(tmp_path: Path) -> None:
    with StateFolder(tmp_path / "s") as state:
        found(state)
        key, admin_key = state.node_key(), state.admin_key()
        state.save_ledger(LEDGER)
        state.save_highest_term(3)
        state.forget()
        state.forget()

        assert set(modes(tmp_path / "s")) == {"node.key", ADMIN_KEY_FILE, "lock"}
        assert (state.membership(), state.authority(), state.ledger()) == (None, None, TokenLedger())
        assert (state.node_key().node_id, state.admin_key()) == (key.node_id, admin_key)


def test_two_daemons_cannot_share_it(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    hold = _TAKE + "with StateFolder(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(StateInUse, match=f"in use by another daemon, process {process.pid}") as error:
            StateFolder(folder).__enter__()
        process.kill()
        process.wait()
        with StateFolder(folder) as state:  # a killed daemon's lock is gone with it
            assert state.membership() is None

    assert error.value.exit_code == 1
    assert "--state-dir" in error.value.next_step


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    code = _TAKE + (
        "import os\n"
        "state = StateFolder(Path(sys.argv[1])).__enter__()\n"
        "pid = os.fork()\n"
        "if pid == 0: os.close(1); sys.stdin.read(); os._exit(0)\n"
        "print(pid, flush=True); os._exit(0)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.wait()
        os.kill(child, 0)  # the child lives
        with StateFolder(folder):
            pass


@pytest.mark.parametrize("name", ["membership.json", "tokens.json", "term.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    with StateFolder(tmp_path) as state:
        found(state)
        state.save_ledger(LEDGER)
        state.save_highest_term(1)
        (tmp_path / name).write_bytes(b'{"mesh_id": 3')
        with pytest.raises(InvalidInput, match=f"{name} is damaged") as error:
            (state.membership, state.ledger, state.highest_term)[
                ["membership.json", "tokens.json", "term.json"].index(name)
            ]()
    assert error.value.next_step


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StateFolder(tmp_path) as state:
        state.save_ledger(LEDGER)
        monkeypatch.setattr(os, "fsync", _disk_full)
        with pytest.raises(HexmeshError, match=r"tokens\.json cannot be written: No space left") as error:
            state.save_ledger(TokenLedger())
        monkeypatch.undo()

        assert state.ledger() == LEDGER
    assert error.value.next_step


def _disk_full(handle: int) -> None:
    raise OSError(28, "No space left on device")


def test_an_unusable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(InvalidInput, match="cannot be used") as error:
        StateFolder(tmp_path / "file").__enter__()
    assert "--state-dir" in error.value.next_step


def test_what_is_stored_of_a_token_is_no_secret(tmp_path: Path) -> None:
    with StateFolder(tmp_path) as state:
        state.save_ledger(LEDGER)
        stored = json.loads((tmp_path / "tokens.json").read_text())

    assert "ssss" not in json.dumps(stored)
    assert [record["uses"] for record in stored["records"]] == [2]
