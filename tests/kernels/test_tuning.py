"""Configurations: which file, which entry, and that every shipped file is sound."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scrimp.kernels import tuning

ENTRIES = [
    {"shape": {"rows": 16, "head_dim": 64}, "config": {"BLOCK": 1}},
    {"shape": {"rows": 64, "head_dim": 64}, "config": {"BLOCK": 2}},
    {"shape": {"rows": 64, "head_dim": 256}, "config": {"BLOCK": 3}},
]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    tuning._entries.cache_clear()
    tuning.device_names.cache_clear()
    monkeypatch.setattr(tuning, "CONFIGS", tmp_path)
    file(tmp_path, "default", ENTRIES)
    yield
    tuning._entries.cache_clear()
    tuning.device_names.cache_clear()


def file(folder: Path, name: str, entries: list[dict[str, Any]]) -> None:
    (folder / "made_up").mkdir(exist_ok=True)
    (folder / "made_up" / f"{name}.json").write_text(json.dumps(entries))


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ({"rows": 16, "head_dim": 64}, 1),
        ({"rows": 1, "head_dim": 64}, 1),
        ({"rows": 31, "head_dim": 64}, 1),
        ({"rows": 32, "head_dim": 64}, 1),  # as far from 16 as from 64: the first
        ({"rows": 33, "head_dim": 64}, 2),
        ({"rows": 100_000, "head_dim": 96}, 2),
        ({"rows": 64, "head_dim": 129}, 3),
        ({"rows": 1, "head_dim": 256}, 1),  # 4 + 2 doublings to the first, 6 + 0 to the last
        ({"rows": 32, "head_dim": 256}, 3),
        ({"rows": 64}, 2),  # a field that is not asked for does not count
        ({"other": 7}, 1),
    ],
)
def test_nearest_shape(shape: dict[str, int], block: int) -> None:
    assert tuning.config("made_up", CPU, **shape) == {"BLOCK": block}


def test_distance() -> None:
    assert tuning.distance({"a": 8, "b": 3}, {"a": 2, "c": 5}) == 2
    assert tuning.distance({"a": 2}, {"a": 8}) == tuning.distance({"a": 8}, {"a": 2})


def test_the_callers_copy_is_its_own() -> None:
    tuning.config("made_up", CPU, rows=16)["BLOCK"] = 99
    assert tuning.config("made_up", CPU, rows=16)["BLOCK"] == 1


def test_fallbacks(tmp_path: Path) -> None:
    file(tmp_path, "sm_80", [{"shape": {}, "config": {"BLOCK": 8}}])
    assert tuning.config("made_up", "sm_80", rows=64) == {"BLOCK": 8}
    assert tuning.config("made_up", "sm_90", rows=64) == {"BLOCK": 2}
    with pytest.raises(FileNotFoundError, match=r"nothing: no configuration among sm_80, default in .*nothing"):
        tuning.config("nothing", "sm_80", rows=64)


@pytest.mark.parametrize(
    ("name", "hip", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", None, ("nvidia-a100-sxm4-80gb", "sm_80", "default")),
        ("AMD Instinct MI300X", "6.4", ("amd-instinct-mi300x", "gfx942", "default")),
    ],
)
def test_device_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, hip: str | None, expected: tuple[str, ...]
) -> None:
    found = SimpleNamespace(name=name, major=8, minor=0, gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.version, "hip", hip)
    device = torch.device("cuda", 0)
    assert tuning.device_names(device) == expected
    for block, file_name in enumerate(reversed(expected)):  # the most exact one that is there
        file(tmp_path, file_name, [{"shape": {}, "config": {"BLOCK": block}}])
        tuning._entries.cache_clear()
        assert tuning.config("made_up", device, rows=1) == {"BLOCK": block}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_other_devices_use_the_default(device: str) -> None:
    assert tuning.device_names(torch.device(device)) == ("default",)


SHIPPED = sorted((Path(tuning.__file__).parent / "configs").glob("*/*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shipped_files(path: Path) -> None:
    entries = json.loads(path.read_text())
    assert entries
    for entry in entries:
        assert set(entry) == {"shape", "config"}
        assert all(isinstance(value, int) for value in (*entry["shape"].values(), *entry["config"].values()))
        assert all(size > 0 for size in entry["shape"].values())
        assert all(value > 0 or (name == "SPLIT" and value == 0) for name, value in entry["config"].items())
        assert entry["config"]["num_warps"] in (1, 2, 4, 8, 16)
        assert set(entry["config"]) == set(entries[0]["config"])
        assert set(entry["shape"]) == set(entries[0]["shape"])
    shapes = [json.dumps(entry["shape"], sort_keys=True) for entry in entries]
    assert len(set(shapes)) == len(shapes)
