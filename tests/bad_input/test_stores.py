"""Flow stores with flipped bits, missing or strange files, and edited metadata."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowreel.engine.config import SinkConfig
from flowreel.engine.data import FlowBatch, FlowInfo, SourceId
from flowreel.sinks import open_sink, open_store

Answer = dict[str, Any]
Catalogue = Any  # the fixture of conftest.py
Mangled = Callable[[bytes, random.Random], bytes]
Files = dict[str, bytes]

FLOWS, HEIGHT, WIDTH = 5, 6, 8
KINDS = {"blosc": (1 / 64, "blosc"), "lossless": (0, "zstd")}
LIES = (
    *(
        None,
        True,
        -1,
        0,
        1,
        3,
        2**31,
        2**63,
        10**40,
        0.5,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "x",
        "1/0",
        "9" * 5000,
    ),
    *(
        "\x1b[31m\n",
        [],
        [0],
        [1, 2, 8, 8],
        {},
        {"name": "bytes"},
        [[]] * 4,
        "NaN",
        "int64",
        "<i2",
        -32768,
        "0" * 200_000,
    ),
)


@pytest.fixture(scope="module", params=list(KINDS))
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The files of a sound store of three shards."""
    max_error, codec = KINDS[request.param]
    return sound_store(tmp_path_factory.mktemp("store"), max_error, codec)


@pytest.fixture(scope="module")
def one_store(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return sound_store(tmp_path_factory.mktemp("store"), 1 / 64, "blosc")


def sound_store(folder: Path, max_error: float, codec: str) -> Files:
    config = SinkConfig(max_error=max_error, codec=codec, shard_bytes=2 * 8 * HEIGHT * WIDTH)  # type: ignore[arg-type]
    made_by = {"model": "FlowNet2S", "weights": "tiny", "direction": "forward", "notes": ["none"], "start": 0}
    info = FlowInfo(HEIGHT, WIDTH, Fraction(25), FLOWS + 1, SourceId("clip.mp4", 1000, 0.24, "00"), made_by)
    flow = torch.from_numpy(np.random.default_rng(0).normal(size=(FLOWS, 2, HEIGHT, WIDTH)).astype(np.float32))
    flow[2, :, 0, 0] = torch.nan
    frame = np.arange(FLOWS)
    sink = open_sink(str(folder / "x.zarr"), config)
    sink.open(info)
    sink.write(FlowBatch(flow, 0, frame, frame + 1, frame / 25, (frame + 1) / 25))
    sink.commit()
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def truth(files: Files, folder: Path) -> Callable[[Answer], bool]:
    """Whether a store that could be read gave everything that the sound store holds."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    sound = open_store(folder / "x.zarr")
    numbers = [sound.timestamps_s, sound.timestamps_to_s, sound.frame, sound.frame_to]
    found = hashlib.sha256()
    for array in [*numbers, *sound]:
        found.update(repr((array.shape, str(array.dtype))).encode() + np.ascontiguousarray(array).tobytes())
    return lambda answer: answer["value"]["digest"] == found.hexdigest()


def copied(answer: Answer) -> bool:
    """Whether the exported store is finished and has as many flows as the original."""
    made = open_store(answer["folder"] / "a.zarr")
    return made.complete and len(made) == FLOWS and np.isfinite(made[0]).all()


def test_damaged_files(store: Files, catalogue: Catalogue, mangled: Mangled, tmp_path: Path) -> None:
    right = truth(store, tmp_path / "sound")
    names = sorted(store)
    for seed in range(60):
        chance = random.Random(seed)
        name = chance.choice(names)
        files = {**store, name: mangled(store[name], chance)}
        catalogue.read(f"{name} mangled {seed}", "store", "x.zarr", files, right=right)
    for name in names:
        files = {other: data for other, data in store.items() if other != name}
        catalogue.read(f"without {name}", "store", "x.zarr", files, right=right)
        catalogue.read(f"{name} empty", "store", "x.zarr", {**store, name: b""}, right=right)
        catalogue.read(f"{name} a folder", "store", "x.zarr", {**files, f"{name}/x": b""}, right=right)
        other = random.Random(name).choice(names)
        swapped = {**store, name: store[other]}  # an intact file in the wrong place
        catalogue.read(f"{name} as {other}", "store", "x.zarr", swapped, right=right)
    catalogue.judge(130)


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every part of a JSON value."""
    if path:
        yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from paths_in(part, (*path, key))


def edited(value: Any, path: tuple[Any, ...], lie: Any, delete: bool = False) -> Any:
    value = copy.deepcopy(value)
    place = value
    for key in path[:-1]:
        place = place[key]
    if delete:
        del place[path[-1]]
    else:
        place[path[-1]] = lie
    return value


def test_edited_metadata(one_store: Files, catalogue: Catalogue, tmp_path: Path) -> None:
    """Every value in every zarr.json is replaced or removed."""
    right = truth(one_store, tmp_path / "sound")
    for name in sorted(name for name in one_store if name.endswith("zarr.json")):
        metadata = json.loads(one_store[name])
        for path in paths_in(metadata):
            if "consolidated_metadata" in path and len(path) > 3 and hash_of(name, path) % 8:
                continue  # copies of the arrays' own metadata, of which a few are enough
            if "_crc32c" in name and hash_of(path, name) % 4:
                continue  # these arrays are like those of times
            number = hash_of(path, name) % (2 * len(LIES))
            gone = number >= len(LIES)
            lie = LIES[number % len(LIES)]
            files = {**one_store, name: json.dumps(edited(metadata, path, lie, gone)).encode()}
            what = "gone" if gone else f"{str(lie)[:30]!r}"
            catalogue.read(f"{name} {path} {what}", "store", "x.zarr", files, right=right)
    catalogue.judge(250)


def hash_of(*values: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(values).encode()).digest()[:4], "big")


def test_strange_metadata(one_store: Files, catalogue: Catalogue) -> None:
    texts = (
        *(b"", b"{", b"null", b"[]", b"7", b'"x"', b"{}", b"\xff\xfe", b"nan", b"[" * 200_000, b'{"a":' * 200_000),
        *(b'{"zarr_format": 3}', b'{"zarr_format": 2, "node_type": "group"}', b" " * 1_000_000, b"9" * 100_000),
    )
    for name in ("x.zarr/zarr.json", "x.zarr/flow/zarr.json", "x.zarr/frame/zarr.json"):
        for text in texts:
            catalogue.read(f"{name} is {text[:20]!r}", "store", "x.zarr", {**one_store, name: text})
    huge = json.loads(one_store["x.zarr/flow/zarr.json"])
    for count, height, width in ((2**26, 6, 8), (5, 10_000, 13_000), (2**26, 10_000, 13_000), (5, 2**26, 2)):
        huge["shape"] = [count, 2, height, width]
        huge["chunk_grid"]["configuration"]["chunk_shape"] = [2, 2, height, width]
        huge["codecs"][0]["configuration"]["chunk_shape"] = [1, 2, height, width]
        group = json.loads(one_store["x.zarr/zarr.json"])
        group["consolidated_metadata"]["metadata"]["flow"] = huge
        files = {**one_store, "x.zarr/flow/zarr.json": json.dumps(huge).encode()}
        files["x.zarr/zarr.json"] = json.dumps(group).encode()
        for command in (["info"], ["export", "-o", "a.zarr"], ["color", "-o", "a.mp4"]):
            catalogue.call(f"{count} flows of {width}x{height}", [*command, "x.zarr"], files, right=lambda answer: True)
    catalogue.judge(50)


def test_edited_attributes_on_the_command_line(one_store: Files, catalogue: Catalogue) -> None:
    """A store's own attributes are shown and copied to exports; they may contain anything."""
    group = json.loads(one_store["x.zarr/zarr.json"])
    commands = (
        (["info", "x.zarr"], lambda answer: bool(answer["out"])),
        (["info", "--json", "x.zarr"], lambda answer: bool(json.loads(answer["out"]))),
        (["export", "x.zarr", "-o", "a.zarr"], copied),
        (["color", "x.zarr", "-o", "a", "-v", "-q"], lambda answer: (answer["folder"] / "a" / "x.flo.mp4").exists()),
    )
    for path in paths_in(group):
        for lie in LIES if path[:2] == ("attributes", "flowreel") else ():
            arguments, right = commands[hash_of(path, lie) % len(commands)]
            if path[-1] not in ("source", "frame_rate") and hash_of(lie, path) % 4:
                continue
            files = {**one_store, "x.zarr/zarr.json": json.dumps(edited(group, path, lie)).encode()}
            catalogue.call(f"{path} {str(lie)[:30]!r}", arguments, files, right=right)
    catalogue.judge(150)


def test_damaged_stores_on_the_command_line(one_store: Files, catalogue: Catalogue, mangled: Mangled) -> None:
    names = sorted(one_store)
    outputs = ("a.zarr", "a.mp4", "a/%06d.flo", "a/%06d.png", "a/%06d.npz", "a/flow_x_%05d.jpg")
    for seed in range(24):
        chance = random.Random(seed)
        name = chance.choice(names)
        files = {**one_store, name: mangled(one_store[name], chance)}
        output = outputs[seed % len(outputs)]
        catalogue.call(f"{name} {seed}", ["export", "x.zarr", "-o", output], files, right=bool)
        catalogue.call(f"{name} {seed}", ["export", "x.zarr@1:3", "-o", output], files, right=bool)
        catalogue.call(f"{name} {seed}", ["info", "x.zarr"], files, right=bool)
        catalogue.call(f"{name} {seed}", ["verify", "x.zarr"], files, right=bool, wordy=True)
    for part in ("@", "@5", "@-6", "@3:3", "@9:", "@:-9", "@99999999999999999999", "@1:2:3", "@x", "@-", "@1@2", "/@7"):
        catalogue.call(part, ["export", f"x.zarr{part}", "-o", "a.zarr"], one_store)
    catalogue.judge(80)


def test_strange_files_in_a_store(one_store: Files, catalogue: Catalogue, tmp_path: Path) -> None:
    """Pipes and devices in place of files do not block the reader, and circular links are not followed for ever."""
    right = truth(one_store, tmp_path / "sound")
    makers: dict[str, Callable[[Path], None]] = {
        "a pipe": os.mkfifo,
        "a link to nowhere": lambda path: path.symlink_to("nowhere"),
        "a link to itself": lambda path: path.symlink_to(path),
        "endless zeros": lambda path: path.symlink_to("/dev/zero"),
        "nothing": lambda path: path.symlink_to("/dev/null"),
    }
    for name in sorted(one_store):
        for what, make in makers.items():
            folder = catalogue.place()
            path = folder / name
            path.parent.mkdir(parents=True)
            make(path)
            rest = {other: data for other, data in one_store.items() if other != name}
            catalogue.read(f"{name} is {what}", "store", "x.zarr", rest, right=right)
    for what, make in makers.items():
        make(catalogue.place() / "x.zarr")
        catalogue.read(f"the store is {what}", "store", "x.zarr")
    loop = catalogue.place() / "x.zarr"
    loop.mkdir()
    (loop / "loop").symlink_to(loop)
    catalogue.read("a folder in itself", "store", "x.zarr", one_store, right=right)
    catalogue.judge(90)


def test_unfinished_stores(one_store: Files, catalogue: Catalogue, mangled: Mangled) -> None:
    """Damage is handled in unfinished stores too."""

    def right(answer: Answer) -> bool:
        return not answer["value"]["complete"]

    partial = {name.replace("x.zarr", "x.zarr.partial"): data for name, data in one_store.items()}
    for seed in range(40):
        chance = random.Random(seed)
        name = chance.choice(sorted(partial))
        files = {**partial, name: mangled(partial[name], chance)}
        catalogue.read(f"{name} {seed}", "store", "x.zarr", files, right=right)
        catalogue.call(f"{name} {seed}", ["info", "x.zarr"], files, right=bool)
    for name in sorted(partial):
        files = {other: data for other, data in partial.items() if other != name}
        catalogue.read(f"without {name}", "store", "x.zarr", files, right=right)
    catalogue.judge(90)
