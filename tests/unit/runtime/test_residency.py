"""What a device holds: shared layers, budgets, deferred pools, and folders that cannot be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import torch

from hexmesh.errors import InvalidInput, NotReady, Refused
from hexmesh.runtime.residency import Promotion, Residency
from hexmesh.runtime.stage import Stage
from hexmesh.wire.data import Row, SamplingParams
from hexmesh.wire.worker import LoadStage, StageLoaded
from tests.golden.tiny_models import save_tiny_model

PROMPT = [5, 9, 33, 80, 7]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers, a head of its own."""
    path = tmp_path_factory.mktemp("llama")
    save_tiny_model("llama", path)
    return path


@pytest.fixture(scope="module")
def tied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    save_tiny_model("qwen3", path)
    return path


@pytest.fixture
def residency() -> Residency:
    return Residency(torch.device("cpu"))


def order(folder: Path, stage: str, start: int, stop: int, budget_bytes: int = 2**30) -> LoadStage:
    return LoadStage(
        stage=stage,
        pool=stage,
        model_dir=str(folder),
        model_id="tiny",
        start=start,
        stop=stop,
        dtype="float32",
        kv_blocks=16,
        block_tokens=4,
        budget_bytes=budget_bytes,
    )


def found(residency: Residency, stage: str) -> Stage:
    stage_found = residency.find(stage)
    assert isinstance(stage_found, Stage)
    return stage_found


def next_token(*stages: Stage) -> int:
    payload = torch.tensor(PROMPT)
    row = Row(start=0, n_tokens=len(PROMPT), blocks=[3, 1], sample=SamplingParams())
    for stage in stages:
        output = stage.run([row], payload)
        if output.hidden is None:
            return output.sampled[0][0].token_id
        payload = output.hidden
    raise AssertionError("no last stage")


def test_bytes_are_those_of_the_model(residency: Residency, folder: Path) -> None:
    loaded = residency.load(order(folder, "whole", 0, 5))

    files = (folder / "model.safetensors").stat().st_size
    assert files - 8192 < loaded.weight_bytes < files
    assert loaded.pool_bytes == 5 * 2 * 16 * 4 * 2 * 16 * 4
    assert (loaded.pool_deferred, loaded.n_layers_reused) == (False, 0)
    assert found(residency, "whole").pool.n_bytes == loaded.pool_bytes


def test_layers_in_place_are_shared_and_not_read_again(
    residency: Residency, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    residency.load(order(folder, "old", 0, 3))
    residency.load(order(folder, "rest", 3, 5))
    expected = next_token(found(residency, "old"), found(residency, "rest"))
    read: list[str] = []
    from hexmesh.runtime import weights

    slices = weights.Checkpoint.slices

    def recorded(self: weights.Checkpoint, keys: object, files: object) -> object:
        names = list(keys)  # type: ignore[call-overload]
        read.extend(names)
        return slices(self, names, files)  # type: ignore[arg-type]

    monkeypatch.setattr(weights.Checkpoint, "check_files", lambda *_: None)
    monkeypatch.setattr(weights.Checkpoint, "slices", recorded)

    loaded = residency.load(order(folder, "new", 0, 5))

    assert loaded.n_layers_reused == 5
    assert read == ["model.norm.weight"]
    assert next_token(found(residency, "new")) == expected
    old, new = found(residency, "old"), found(residency, "new")
    assert old.splice.part("layer 1") is new.splice.part("layer 1")
    assert old.pool is not new.pool


def test_shared_layers_outlive_the_stage_that_read_them(residency: Residency, folder: Path) -> None:
    residency.load(order(folder, "old", 0, 5))
    expected = next_token(found(residency, "old"))
    residency.load(order(folder, "front", 0, 2))
    residency.load(order(folder, "back", 2, 5))

    assert residency.drop("old") == []

    assert residency.find("old") is None
    assert next_token(found(residency, "front"), found(residency, "back")) == expected


def test_weights_that_nobody_shares_are_read_anew(residency: Residency, folder: Path) -> None:
    residency.load(order(folder, "old", 0, 3))
    residency.drop("old")

    assert residency.load(order(folder, "new", 0, 3)).n_layers_reused == 0


def test_tied_head_shares_the_embedding_that_is_loaded(residency: Residency, tied_folder: Path) -> None:
    residency.load(order(tied_folder, "first", 0, 2))
    residency.load(order(tied_folder, "last", 2, 5))
    first, last = found(residency, "first"), found(residency, "last")
    expected = next_token(first, last)

    assert last.splice.part("head").weight is first.splice.part("embedding").weight
    residency.drop("first")
    residency.load(order(tied_folder, "whole", 0, 5))
    assert next_token(found(residency, "whole")) == expected


def test_other_model_or_dtype_shares_nothing(residency: Residency, folder: Path) -> None:
    residency.load(order(folder, "one", 0, 3))
    base = order(folder, "two", 0, 3)
    fields = {name: getattr(base, name) for name in base.__struct_fields__}

    other_dtype = residency.load(LoadStage(**{**fields, "dtype": "bfloat16"}))
    other_model = residency.load(LoadStage(**{**fields, "stage": "three", "model_id": "other"}))

    assert (other_dtype.n_layers_reused, other_model.n_layers_reused) == (0, 0)


def test_stage_over_its_budget_is_refused_with_the_numbers(residency: Residency, folder: Path) -> None:
    loaded = residency.load(order(folder, "fits", 0, 2))
    needed_bytes = loaded.weight_bytes + loaded.pool_bytes
    residency.drop("fits")

    with pytest.raises(NotReady) as caught:
        residency.load(order(folder, "large", 0, 2, budget_bytes=needed_bytes - 1))

    assert (caught.value.needed_bytes, caught.value.room_bytes) == (needed_bytes, needed_bytes - 1)
    assert str(needed_bytes) in caught.value.message
    assert residency.find("large") is None
    residency.load(order(folder, "exact", 0, 2, budget_bytes=needed_bytes))


def test_pool_waits_for_another_stage_to_go(residency: Residency, folder: Path) -> None:
    old = residency.load(order(folder, "old", 0, 5))
    room_bytes = old.weight_bytes + old.pool_bytes + 2048

    new = residency.load(order(folder, "new", 0, 5, budget_bytes=room_bytes))

    assert new.pool_deferred
    assert new.n_layers_reused == 5
    assert residency.find("new") == "waiting"
    assert isinstance(residency.find("old"), Stage)
    assert residency.drop("old") == [Promotion("new", None)]
    assert next_token(found(residency, "new")) >= 0


def test_the_same_stage_of_two_plans_needs_one_pool(residency: Residency, folder: Path) -> None:
    """With room for one pool alone, a sequence of the old plan goes on, and in the new one too."""
    room_bytes = _needed(residency.load(order(folder, "old", 0, 5))) + 2048
    expected = next_token(found(residency, "old"))

    new = residency.load(with_pool(order(folder, "new", 0, 5, budget_bytes=room_bytes), "old"))

    assert (new.pool_deferred, new.n_layers_reused) == (False, 5)
    assert found(residency, "new").pool is found(residency, "old").pool
    assert residency.drop("old") == []
    row = Row(start=4, n_tokens=1, blocks=[3, 1], sample=SamplingParams())
    output = found(residency, "new").run([row], torch.tensor(PROMPT[4:]))
    assert output.sampled[0][0].token_id == expected, "KV that the old stage wrote is gone"


def test_a_pool_goes_with_the_last_stage_that_uses_it(residency: Residency, folder: Path) -> None:
    residency.load(order(folder, "old", 0, 3))
    residency.load(with_pool(order(folder, "new", 0, 3), "old"))
    stage_in_use = found(residency, "new")
    stage_in_use.run([Row(start=0, n_tokens=1, blocks=[0])], torch.tensor([5]))
    for stage in ("old", "new"):
        residency.drop(stage)

    residency.load(with_pool(order(folder, "later", 0, 3), "old"))

    assert not found(residency, "later").pool.layer(0).k.any()


def test_other_layers_share_no_pool_whatever_its_name(residency: Residency, folder: Path) -> None:
    residency.load(order(folder, "old", 0, 3))
    residency.load(with_pool(order(folder, "new", 0, 4), "old"))
    assert found(residency, "new").pool is not found(residency, "old").pool


def with_pool(load: LoadStage, pool: str) -> LoadStage:
    return msgspec.structs.replace(load, pool=pool)


def test_weights_wait_too_where_not_even_they_fit(residency: Residency, folder: Path) -> None:
    old = residency.load(order(folder, "old", 0, 3))
    new_bytes = _needed(residency.load(order(folder, "probe", 3, 5)))
    residency.drop("probe")

    new = residency.load(order(folder, "new", 3, 5, budget_bytes=max(_needed(old), new_bytes) + 1024))

    assert new.pool_deferred
    assert residency.find("new") == "waiting"
    assert residency.drop("unknown") == []
    assert residency.drop("old") == [Promotion("new", None)]
    assert isinstance(residency.find("new"), Stage)


def _needed(loaded: StageLoaded) -> int:
    return loaded.weight_bytes + loaded.pool_bytes


def test_deferred_weights_that_cannot_be_read_fail_when_their_turn_comes(
    residency: Residency, tmp_path: Path
) -> None:
    save_tiny_model("llama", tmp_path)
    old = residency.load(order(tmp_path, "old", 0, 3))
    residency.load(order(tmp_path, "new", 3, 5, budget_bytes=_needed(old) + 1024))
    (tmp_path / "model.safetensors").unlink()

    [promotion] = residency.drop("old")

    assert promotion.stage == "new"
    assert isinstance(promotion.error, InvalidInput)
    assert residency.find("new") is None


def test_a_stage_that_is_loaded_is_not_replaced(residency: Residency, folder: Path) -> None:
    """Its KV blocks hold live sequences."""
    residency.load(order(folder, "one", 0, 2))
    stage = found(residency, "one")

    with pytest.raises(InvalidInput, match="loaded already"):
        residency.load(order(folder, "one", 0, 3))

    assert residency.find("one") is stage


def test_layers_that_do_not_exist(residency: Residency, folder: Path) -> None:
    for start, stop in ((0, 6), (3, 3), (-1, 2)):
        with pytest.raises(InvalidInput, match="5 layers"):
            residency.load(order(folder, "bad", start, stop))


def test_unknown_architecture_is_refused_before_weights(residency: Residency, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))

    with pytest.raises(Refused, match="mamba"):
        residency.load(order(tmp_path, "bad", 0, 1))


@pytest.mark.parametrize("damage", ["cut short", "bad header", "not there", "tensor missing", "wrong shape"])
def test_damaged_weights_are_refused(damage: str, residency: Residency, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    content = (folder / "model.safetensors").read_bytes()
    if damage == "cut short":
        content = content[: len(content) // 2]
    elif damage == "bad header":
        content = b"\xff" * 8 + content[8:]
    elif damage == "tensor missing":
        content = content.replace(b"model.layers.1.mlp.up_proj.weight", b"model.layers.1.mlp.xx_proj.weight")
    elif damage == "wrong shape":
        config = json.loads((folder / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 97}))
    if damage != "not there":
        (tmp_path / "model.safetensors").write_bytes(content)

    with pytest.raises(InvalidInput):
        residency.load(order(tmp_path, "bad", 0, 2))

    assert residency.find("bad") is None


def test_index_may_not_lead_out_of_the_folder(residency: Residency, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    index = {"weight_map": {"model.norm.weight": f"../{folder.name}/model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(InvalidInput, match="own folder"):
        residency.load(order(tmp_path, "bad", 0, 2))


@pytest.mark.parametrize(
    ("row", "payload"),
    [
        (Row(start=0, n_tokens=2, blocks=[0]), [1, 2, 3]),
        (Row(start=3, n_tokens=2, blocks=[0]), [1, 2]),
        (Row(start=-1, n_tokens=2, blocks=[0]), [1, 2]),
        (Row(start=0, n_tokens=1, blocks=[16]), [1]),
        (Row(start=0, n_tokens=1, blocks=[-1]), [1]),
        (Row(start=0, n_tokens=1, blocks=[]), [1]),
        (Row(start=0, n_tokens=1, blocks=[0]), [160]),
        (Row(start=0, n_tokens=1, blocks=[0]), [-1]),
        (Row(start=127, n_tokens=2, blocks=list(range(16)) * 3), [1, 1]),
        (Row(start=0, n_tokens=0, blocks=[0]), []),
    ],
    ids=str,
)
def test_steps_that_cannot_be_are_refused_untouched(
    row: Row, payload: list[int], residency: Residency, folder: Path
) -> None:
    residency.load(order(folder, "whole", 0, 5))
    stage = found(residency, "whole")

    with pytest.raises(InvalidInput):
        stage.run([row], torch.tensor(payload, dtype=torch.int64))

    assert not stage.pool.layer(0).k.any()
