"""Models from a folder and from a hub on loopback: download, resume, cache, refusals and the model's id."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from daemon.models import manifests
from daemon.models.manifests import local_manifest
from daemon.models.model_source import SHIPPED_MODEL, SHIPPED_NAME, resolve_model
from hexmesh.errors import InvalidInput
from hexmesh.weights.safetensors_format import single_tensor_header
from tests.golden.tiny_models import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "c0ffee" * 6 + "c0ff"
HUB_ID = "tiny-org/tiny-model"
CONFIG = {"model_type": "llama", "eos_token_id": 1}
WEIGHTS = single_tensor_header("a", "U8", (2**20,), 2**20) + bytes(range(256)) * 4096
FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "generation_config.json": b'{"eos_token_id": [1, 2]}',
    "tokenizer.json": b'{"version": "1.0"}',
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"not wanted",
    "onnx/model.safetensors": b"not wanted either",
    "modeling_tiny.py": b"raise SystemExit('remote code ran')",
}
WANTED = {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"}


# --- a hub ---


@dataclass
class Hub:
    """What the server serves and has seen. `cut` files break off half way once."""

    files: Mapping[str, bytes] = field(default_factory=lambda: dict(FILES))
    gated: bool = False
    cut: set[str] = field(default_factory=set)
    seen: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method, path, Range header)"""
    url: str = ""

    def downloads(self) -> list[tuple[str, str | None]]:
        """(file, Range header) of every GET of a file."""
        start = f"/{HUB_ID}/resolve/{COMMIT}/"
        return [
            (path.removeprefix(start), wanted_range)
            for method, path, wanted_range in self.seen
            if method == "GET" and path.startswith(start)
        ]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = self.path.split("?")[0]
            hub.seen.append((self.command, path, self.headers.get("Range")))
            if hub.gated:
                return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
            if path == f"/api/models/{HUB_ID}/revision/main" or path == f"/api/models/{HUB_ID}":
                siblings = [{"rfilename": name} for name in hub.files]
                return self._send_json({"id": HUB_ID, "sha": COMMIT, "siblings": siblings})
            if path == f"/api/models/{HUB_ID}/tree/{COMMIT}":
                return self._send_json([_tree_entry(name, data) for name, data in hub.files.items()])
            name = path.removeprefix(f"/{HUB_ID}/resolve/{COMMIT}/")
            if name in hub.files:
                return self._send_file(name, hub.files[name])
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def _send_file(self, name: str, data: bytes) -> None:
            headers = {"ETag": f'"{_blob_id(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            start = 0
            if wanted_range := self.headers.get("Range"):
                start = int(wanted_range.removeprefix("bytes=").split("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            body = data[start:]
            if self.command == "GET" and name in hub.cut:
                hub.cut.remove(name)
                self._send(200, body, headers, n_sent=len(body) // 2)
                self.close_connection = True
                return
            self._send(206 if start else 200, body, headers)

        def _send_json(self, value: object) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(
            self, status: int, body: bytes, headers: Mapping[str, str], n_sent: int | None = None
        ) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[:n_sent])

    return Handler


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _tree_entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": _blob_id(data)}


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub)) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


_SCRIPT = """
import json, sys
from pathlib import Path
from daemon.models.model_source import resolve_model
from hexmesh.errors import HexmeshError
progress = []
try:
    model = resolve_model(sys.argv[1], progress=lambda done, total: progress.append((done, total)))
except HexmeshError as error:
    answer = {"kind": type(error).__name__, "code": error.code, "line": error.one_line()}
else:
    answer = {
        "folder": str(model.folder),
        "name": model.name,
        "root": model.root,
        "config": model.config,
        "generation_config": model.generation_config,
        "files": sorted(path.name for path in model.files),
    }
answer["progress"] = progress
answer["heavy"] = sorted({"torch", "transformers"} & set(sys.modules))
print(json.dumps(answer))
"""


def _resolve(text: str, home: Path, endpoint: str, **more: str) -> dict[str, Any]:
    """What resolve_model says in a process of its own: the hub library reads its settings when imported."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", **more}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _SCRIPT, text],
        env=kept | settings,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert answer.pop("heavy") == []
    return answer


def test_download_then_cache(hub: Hub, tmp_path: Path) -> None:
    first = _resolve(HUB_ID, tmp_path, hub.url)
    folder = Path(first["folder"])
    assert {key: first[key] for key in ("name", "root", "config", "generation_config", "files")} == {
        "name": "tiny-model",
        "root": HUB_ID,
        "config": CONFIG,
        "generation_config": {"eos_token_id": [1, 2]},
        "files": sorted(WANTED),
    }
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: FILES[name] for name in WANTED
    }
    assert folder.is_relative_to(tmp_path)
    assert sorted(name for name, _ in hub.downloads()) == sorted(WANTED)
    n_bytes = sum(len(FILES[name]) for name in WANTED)
    assert first["progress"][-1] == [n_bytes, n_bytes]

    hub.seen.clear()
    second = _resolve(HUB_ID, tmp_path, hub.url)
    assert second["folder"] == first["folder"]
    assert hub.downloads() == []


def test_a_broken_transfer_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    """The hub library keeps what it got in whole chunks of 10 MiB."""
    weights = WEIGHTS * 24
    hub.files = FILES | {"model.safetensors": weights}
    hub.cut.add("model.safetensors")
    answer = _resolve(HUB_ID, tmp_path, hub.url)
    assert (Path(answer["folder"]) / "model.safetensors").read_bytes() == weights
    transfers = [wanted_range for name, wanted_range in hub.downloads() if name == "model.safetensors"]
    assert transfers == [None, "bytes=10485760-"]


def test_without_network_the_cache_serves(hub: Hub, tmp_path: Path) -> None:
    first = _resolve(HUB_ID, tmp_path, hub.url)
    offline = _resolve(HUB_ID, tmp_path, hub.url, HF_HUB_OFFLINE="1")
    unreachable = _resolve(HUB_ID, tmp_path, "http://127.0.0.1:1")
    assert first["folder"] == offline["folder"] == unreachable["folder"]


def test_offline_without_the_files(hub: Hub, tmp_path: Path) -> None:
    answer = _resolve(HUB_ID, tmp_path, hub.url, HF_HUB_OFFLINE="1")
    assert (answer["kind"], answer["code"]) == ("NotReady", "hub_offline")
    assert "unset HF_HUB_OFFLINE" in answer["line"]
    assert hub.seen == []


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    answer = _resolve(HUB_ID, tmp_path, "http://127.0.0.1:1")
    assert (answer["kind"], answer["code"]) == ("NotReady", "hub_unreachable")
    assert "http://127.0.0.1:1" in answer["line"]


def test_an_unknown_id(hub: Hub, tmp_path: Path) -> None:
    answer = _resolve("tiny-org/other", tmp_path, hub.url)
    assert (answer["kind"], answer["code"]) == ("InvalidInput", "unknown_model")
    assert "'tiny-org/other'" in answer["line"]


def test_a_gated_model(hub: Hub, tmp_path: Path) -> None:
    hub.gated = True
    answer = _resolve(HUB_ID, tmp_path, hub.url)
    assert (answer["kind"], answer["code"]) == ("InvalidInput", "model_is_gated")
    assert "set HF_TOKEN" in answer["line"]


def test_a_hub_model_without_safetensors(hub: Hub, tmp_path: Path) -> None:
    hub.files = {name: data for name, data in FILES.items() if not name.endswith(".safetensors")}
    answer = _resolve(HUB_ID, tmp_path, hub.url)
    assert (answer["kind"], answer["code"]) == ("InvalidInput", "no_safetensors")
    assert "save_pretrained" in answer["line"]


# --- folders ---

_INDEX = b'{"weight_map": {"a.weight": "model.safetensors", "b.weight": "b.safetensors"}}'


def _folder(path: Path, **files: bytes | None) -> Path:
    path.mkdir(parents=True)
    changed = {name.replace("__", "."): data for name, data in files.items()}
    for name, data in ({name: FILES[name] for name in WANTED} | changed).items():
        if data is not None:
            (path / name).write_bytes(data)
    return path


def test_the_model_that_ships() -> None:
    model = resolve_model()
    assert (model.folder, model.name, model.root) == (SHIPPED_MODEL, SHIPPED_NAME, SHIPPED_NAME)
    assert model.config["model_type"] == "llama"


def test_a_folder_is_named_by_its_last_part(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "Some-Model")
    model = resolve_model(f"{folder}/")
    assert (model.name, model.root) == ("Some-Model", f"{folder}/")
    assert {path.name for path in model.files} == WANTED


@pytest.mark.parametrize(
    ("files", "code", "said"),
    [
        ({"config__json": None}, "not_a_model", "no config.json"),
        ({"config__json": b"[]"}, "not_a_model", "not a JSON object"),
        ({"config__json": b"{"}, "not_a_model", "not JSON"),
        ({"tokenizer__json": None}, "no_tokenizer", "no tokenizer.json"),
        ({"model__safetensors": None}, "no_safetensors", "no safetensors files"),
        (
            {"model__safetensors": None, "pytorch_model__bin": b""},
            "no_safetensors",
            "only pytorch_model.bin; convert it",
        ),
        (
            {"model__safetensors__index__json": _INDEX},
            "not_a_model",
            "lacks 1 of 2 weight files: b.safetensors",
        ),
        (
            {"model__safetensors__index__json": b'{"weight_map": {"a": "../secret.safetensors"}}'},
            "not_a_model",
            "no weight_map of file names",
        ),
    ],
)
def test_a_folder_that_is_no_model(
    tmp_path: Path, files: dict[str, bytes | None], code: str, said: str
) -> None:
    with pytest.raises(InvalidInput) as refusal:
        resolve_model(str(_folder(tmp_path / "model", **files)))
    assert refusal.value.code == code
    assert said in refusal.value.one_line()


@pytest.mark.parametrize("text", ["./nowhere", "just-a-name", "a/b/c", "-x/y", ""])
def test_what_is_neither_a_folder_nor_a_hub_id(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if text == "":
        text = "missing folder"
    with pytest.raises(InvalidInput, match="neither a model folder nor a hub id"):
        resolve_model(text)


# --- the model's id ---


def test_the_id_is_of_the_contents_alone(tmp_path: Path) -> None:
    first = resolve_model(str(_folder(tmp_path / "one")))
    second = resolve_model(str(_folder(tmp_path / "two", README__md=b"ignored")))
    ids = [
        local_manifest(model, tmp_path / f"cache{index}").id for index, model in enumerate((first, second))
    ]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 64


@pytest.mark.parametrize("changed", sorted(WANTED))
def test_the_id_changes_with_every_file(tmp_path: Path, changed: str) -> None:
    before = local_manifest(resolve_model(str(_folder(tmp_path / "one"))), tmp_path).id
    data = FILES[changed][:-1] + b" }" if changed.endswith(".json") else FILES[changed][:-1] + b"\x01"
    folder = _folder(tmp_path / "two", **{changed.replace(".", "__"): data})
    assert local_manifest(resolve_model(str(folder)), tmp_path).id != before


def test_the_id_does_not_depend_on_how_the_tensors_are_cut_into_files(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "one")
    save_tiny_model("llama", tmp_path / "many", max_shard_size="100KB")
    for folder in ("one", "many"):
        (tmp_path / folder / "tokenizer.json").write_text("{}")
    one, many = (resolve_model(str(tmp_path / folder)) for folder in ("one", "many"))
    assert len(many.files) > len(one.files) + 2
    assert local_manifest(one, tmp_path / "a") == local_manifest(many, tmp_path / "b")


def test_a_second_start_reads_only_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = resolve_model(str(_folder(tmp_path / "one")))
    read: list[str] = []
    real_hash = manifests.hash_chunk

    def counted(path: Path, start: int, n_bytes: int) -> bytes:
        read.append(path.name)
        return real_hash(path, start, n_bytes)

    monkeypatch.setattr(manifests, "hash_chunk", counted)
    cache = tmp_path / "cache"
    first = local_manifest(model, cache)
    assert sorted(read) == sorted(WANTED)
    read.clear()
    assert local_manifest(model, cache) == first
    assert read == []
    (model.folder / "model.safetensors").write_bytes(WEIGHTS[:-1] + b"\x01")
    assert local_manifest(model, cache).id != first.id
    assert read == ["model.safetensors"]


def test_a_spoilt_cache_is_only_a_slow_start(tmp_path: Path) -> None:
    model = resolve_model(str(_folder(tmp_path / "one")))
    first = local_manifest(model, tmp_path)
    for spoilt in (b"", b"[1]", b'{"x": 3}', b"\xff"):
        (tmp_path / manifests.HASHES_NAME).write_bytes(spoilt)
        assert local_manifest(model, tmp_path) == first


def test_a_tensor_that_the_index_names_and_no_file_has_is_an_error(tmp_path: Path) -> None:
    index = b'{"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}'
    model = resolve_model(str(_folder(tmp_path / "one", model__safetensors__index__json=index)))
    with pytest.raises(InvalidInput, match="lacks tensor b"):
        local_manifest(model, tmp_path)


def test_a_file_that_is_cut_short_is_named(tmp_path: Path) -> None:
    model = resolve_model(str(_folder(tmp_path / "one", model__safetensors=WEIGHTS[:-5])))
    with pytest.raises(InvalidInput, match=r"model\.safetensors is damaged: tensor a lies outside"):
        local_manifest(model, tmp_path)
