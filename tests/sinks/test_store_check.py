"""A flipped bit anywhere in a finished store is found, and the report names the flow and frame where known."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowreel.engine.config import SinkConfig
from flowreel.engine.data import FlowBatch, FlowInfo, NativeGrid, SourceId
from flowreel.engine.errors import DamagedStoreError
from flowreel.engine.verify import verify
from flowreel.sinks import store_check, store_layout
from flowreel.sinks.compressors import compress
from flowreel.sinks.store_layout import BESIDE_FLOW, _native_grid, read_json
from flowreel.sinks.store_reader import FlowStore, open_store
from flowreel.sinks.zarr_store import ZarrSink

T, H, W, SHARD = 5, 8, 12, 2  # flows; the last shard is ragged
GRID = NativeGrid(height=16, width=16, factor=4, upsampling="bilinear", fit="pad", top=0, left=0)
KINDS: dict[str, tuple[SinkConfig, NativeGrid | None]] = {
    "blosc": (SinkConfig(codec="blosc"), None),
    "lossless zstd": (SinkConfig(codec="zstd", max_error=0), None),
    "pcodec2d": (SinkConfig(codec="pcodec2d"), None),
    "native pcodec": (SinkConfig(codec="pcodec"), GRID),
}


@pytest.fixture(scope="module", params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlowStore]:
    """A finished store of every second frame of a clip at 25 frames per second; checked without threads, for speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_check, "DECODE_THREADS", 0)
        yield made(tmp_path_factory.mktemp("store") / "X.zarr", *KINDS[request.param])


def made(path: Path, config: SinkConfig, native: NativeGrid | None) -> FlowStore:
    height, width = (60, 61) if native else (H, W)
    stored = (native.height, native.width) if native else (H, W)
    config = replace(config, shard_bytes=SHARD * 8 * stored[0] * stored[1])
    made_by = {"model": "FlowNet2C", "weights": "a \u00e9 b", "max_flow": 1.5e-7, "batch": 2}
    info = FlowInfo(height, width, Fraction(25), T + 1, SourceId("clip.mp4", 9, 1.0), made_by, native)
    values = np.random.default_rng(0).normal(0, 5, (T, 2, *stored)).astype(np.float32)
    frame = 2 * np.arange(T)
    sink = ZarrSink(str(path), config)
    sink.open(info)
    flow = torch.zeros(T, 2, height, width) if native else torch.from_numpy(values)
    times = frame / 25, (frame + 2) / 25
    sink.write(FlowBatch(flow, 0, frame, frame + 2, *times, native=torch.from_numpy(values) if native else None))
    sink.commit()
    return open_store(sink.path)


def files_of(store: FlowStore) -> list[Path]:
    return sorted(path for path in store.folder.rglob("*") if path.is_file())


def reads_the_same(one: bytes, other: bytes) -> bool:
    """Whether two JSON documents are equal; a flipped bit may change only the spelling, such as 1e-7 to 1E-7."""
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def test_nothing_is_wrong_with_a_sound_store(store: FlowStore) -> None:
    assert list(store.check()) == []


def test_a_flipped_bit_anywhere_is_found(store: FlowStore) -> None:
    """Tries a few bits of every file; the findings name the flows or the array that the damaged file belongs to.

    The arrays beside the flow are stored alike whatever its codec, and so are tried with one.
    """
    chance = random.Random(0)
    for path in files_of(store):
        sound = path.read_bytes()
        name = path.relative_to(store.folder).as_posix()
        if name.split("/")[0] in BESIDE_FLOW and store.attrs["codec"] != "blosc":
            continue
        for bit in chance.sample(range(8 * len(sound)), min(24 if name.endswith(".json") else 8, 8 * len(sound))):
            damaged = bytearray(sound)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            found = verify(store.path)
            path.write_bytes(sound)
            if name.endswith(".json"):
                assert not found.sound or reads_the_same(sound, damaged), (name, bit)
                continue
            told = "\n".join(map(str, found.findings))
            if name.startswith("flow/"):
                shard = int(name.split("/")[2])
                flows = [int(number) for number in re.findall(r"flows? (\d+)", told)]
                assert flows, (name, bit)
                assert all(number // SHARD == shard for number in flows), (name, bit, told)
                assert all(f"frame {2 * n}" in told or f"frames {2 * n} to" in told for n in flows), (name, bit, told)
            else:
                assert name.split("/")[0] in told, (name, bit, told)


def test_what_a_store_says_of_its_source_is_that_which_was_written(store: FlowStore) -> None:
    path = store.folder / "zarr.json"
    sound = path.read_text()
    for was, now in (("FlowNet2C", "FlowNet2S"), ("clip.mp4", "clap.mp4"), ("flowreel_crc32c", "flowreel_crc32b")):
        path.write_text(sound.replace(was, now))
        assert any("is not what was written" in problem for problem in map(str, FlowStore(store.folder).check()))
    path.write_text(sound)


@pytest.mark.parametrize("which", ["own", "copy"])
def test_metadata_that_only_others_read_is_compared(store: FlowStore, which: str) -> None:
    path = store.folder / ("flow/zarr.json" if which == "own" else "zarr.json")
    sound = path.read_text()
    path.write_text(sound.replace('"component"', '"compinent"').replace('"units": "pixel"', '"units": "qixel"'))
    told = list(map(str, FlowStore(store.folder).check()))
    path.write_text(sound)
    assert "the metadata of flow and the group's copy of it differ: dimension_names, units" in told


def test_copies_of_metadata_have_to_be_called_so(store: FlowStore) -> None:
    path = store.folder / "zarr.json"
    sound = path.read_text()
    path.write_text(sound.replace('"kind": "inline"', '"kind": "other"'))
    told = list(map(str, FlowStore(store.folder).check()))
    path.write_text(sound)
    assert told == ["zarr.json does not say of its copies of the arrays' metadata that they are that"]


def test_attributes_of_ones_own_are_no_damage(store: FlowStore) -> None:
    documents: list[tuple[Path, str]] = []
    for name in ("zarr.json", "flow/zarr.json", "frame/zarr.json"):
        path = store.folder / name
        documents.append((path, path.read_text()))
        content: dict[str, Any] = json.loads(documents[-1][1])
        content["attributes"]["mine"] = [1, {"a": None}]
        path.write_text(json.dumps(content))
    found = list(FlowStore(store.folder).check())
    for path, text in documents:
        path.write_text(text)
    assert found == []


def test_where_other_readers_are_told_that_vectors_lie(tmp_path: Path) -> None:
    store = made(tmp_path / "X.zarr", SinkConfig(), GRID)
    chunk, metadata = store.folder / "y/c/0", store.folder / "y/zarr.json"
    sound = chunk.read_bytes()

    def told() -> list[str]:
        return list(map(str, open_store(store.path).check()))

    chunk.write_bytes(compress(np.arange(GRID.height, dtype=np.float64), "blosc"))
    assert told() == ["y does not say where the vectors lie"]
    chunk.write_bytes(sound[:-1])
    assert told() == ["chunk 0 of y: checksum is wrong"]
    chunk.unlink()
    assert told() == ["chunk 0 of y is missing"]
    chunk.write_bytes(sound)
    metadata.unlink()
    assert told() == [f"{metadata.parent} is not a Zarr v3 store: it has no zarr.json"]


def test_how_a_prediction_lies_in_the_frame_is_doubted(tmp_path: Path) -> None:
    """Metadata with an impossible prediction layout are refused.

    16x16 vectors of 4x4 pixels each give a flow of 61x60, so 3 columns and 4 rows may be cut off.
    """
    store = made(tmp_path / "X.zarr", SinkConfig(), GRID)
    path = store.folder / "zarr.json"
    sound = path.read_text()
    for native, frame, told in (
        ({"height": 15}, {}, "size of the prediction"),
        ({"upsampling": "cubic"}, {}, "upsampling"),
        ({"fit": "stretch"}, {}, "fit"),
        ({"factor": 0}, {}, "factor"),
        ({"factor": 65}, {}, "factor"),
        ({"factor": True}, {}, "factor"),
        ({"factor": 4.0}, {}, "factor"),
        ({"top": 5}, {}, "rows above"),
        ({"left": -1}, {}, "columns to the left"),
        ({}, {"flow_height": 65}, "rows above"),
        ({"fit": "resize"}, {"flow_height": 0}, "flow_height"),
        ({"fit": "resize"}, {"flow_height": 20_000, "flow_width": 20_000}, "pixels of a flow"),
    ):
        group = json.loads(sound)
        group["attributes"]["flowreel"] |= frame
        group["attributes"]["flowreel"]["native"] |= native
        path.write_text(json.dumps(group))
        with pytest.raises(DamagedStoreError, match=rf"not laid out as flowreel does \({told}: expected"):
            open_store(store.path)
    path.write_text(sound.replace('"flow_height"', '"height"'))
    with pytest.raises(DamagedStoreError, match=r"\(no entry 'flow_height'\)"):
        open_store(store.path)
    with pytest.raises(ValueError, match="pixels of a network's flow"):
        _native_grid(
            {"native": asdict(replace(GRID, height=2048, width=2048, factor=8)), "flow_height": 9, "flow_width": 9},
            2048,
            2048,
        )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"zarr_format": 2}, "is not a flow store"),
        ({"node_type": "array"}, "is not a flow store"),
        ({"format_version": True}, "has store format True"),
        ({"source": "clip.mp4"}, "its attribute source is not what flowreel writes"),
        ({"frame_rate": "25/0"}, "its attribute frame_rate is not what flowreel writes"),
        ({"frame_rate": 25}, "its attribute frame_rate is not what flowreel writes"),
        ({"source_losses": 7}, "its attribute source_losses is not what flowreel writes"),
        ({"source_losses": "3 of 9 frames"}, "its attribute source_losses is not what flowreel writes"),
        ({"max_error": True}, "max_error: expected a number"),
    ],
    ids=str,
)
def test_what_the_group_says_is_doubted(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    store = made(tmp_path / "X.zarr", SinkConfig(), None)
    group = json.loads((store.folder / "zarr.json").read_text())
    (group if change.keys() & group.keys() else group["attributes"]["flowreel"]).update(change)
    (store.folder / "zarr.json").write_text(json.dumps(group))
    with pytest.raises(DamagedStoreError, match=told):
        open_store(store.path)


def test_metadata_of_any_length_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_layout, "MOST_METADATA", 1 << 20)
    path = tmp_path / "zarr.json"
    path.write_text("{}" + " " * ((1 << 20) - 2))
    assert read_json(path) == {}
    os.truncate(path, (1 << 20) + 1)
    with pytest.raises(DamagedStoreError, match="more than 1 MiB"):
        read_json(path)
