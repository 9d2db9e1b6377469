"""What every kind of source promises (see ``Source`` and ``RandomAccess``). Each kind needs an example here."""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowreel.engine.config import SelectConfig
from flowreel.engine.errors import DeviceError, TooFewFramesError, UsageError
from flowreel.engine.protocols import RandomAccess, Source
from flowreel.engine.sources import comes_once, lasting_name, open_random_access, open_source, source_identity
from flowreel.engine.sources.kinds import KINDS, STDIN

COUNT, HEIGHT, WIDTH = 7, 48, 64
Make = Callable[[], str]


@pytest.fixture(params=[kind.module for kind in KINDS])
def make(
    request: pytest.FixtureRequest, tmp_path: Path, clip: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Make]:
    """``make()``: the name of a source of this kind with seven frames, which nobody has read yet."""
    writers: list[threading.Thread] = []

    def stdin() -> str:
        reading, writing = os.pipe()
        data = b"YUV4MPEG2 W64 H48 F25:1 C420\n" + COUNT * (b"FRAME\n" + bytes(HEIGHT * WIDTH * 3 // 2))

        def write() -> None:
            with io.FileIO(writing, "w") as pipe, suppress(BrokenPipeError):
                pipe.write(data)

        writers.append(threading.Thread(target=write))
        writers[-1].start()
        monkeypatch.setattr(sys, "stdin", io.FileIO(reading))
        return STDIN

    def images() -> str:
        for number in range(COUNT):
            Image.new("RGB", (WIDTH, HEIGHT), (number, 0, 0)).save(tmp_path / f"{number}.png")
        return str(tmp_path)

    examples: dict[str, Make] = {
        "y4m": stdin,
        "synthetic": lambda: f"synthetic:objects?size={WIDTH}x{HEIGHT}&frames={COUNT}",
        "images": images,
        "video": lambda: str(clip("contract.mp4", count=COUNT, size=(WIDTH, HEIGHT))),
    }
    assert set(examples) == {kind.module for kind in KINDS}
    yield examples[request.param]
    if isinstance(sys.stdin, io.FileIO):
        sys.stdin.close()
    for writer in writers:
        writer.join()


@pytest.mark.parametrize(
    ("select", "numbers"),
    [
        (SelectConfig(), range(COUNT)),
        (SelectConfig(start=1, stop=6, step=2), range(1, 6, 2)),
        (SelectConfig(start="0.08s", stop="0.2s"), range(2, 5)),
    ],
)
def test_the_header_tells_what_comes(make: Make, select: SelectConfig, numbers: range) -> None:
    with closing(open_source(make(), select)) as source:
        assert isinstance(source, Source)
        info = source.info
        assert (info.height, info.width) == (HEIGHT, WIDTH)
        assert info.frame_count in (len(numbers), None)
        frames = list(source)
    assert [frame.index for frame in frames] == list(numbers)
    assert np.diff([frame.timestamp_s for frame in frames]) == pytest.approx(numbers.step / 25)
    for frame in frames:
        assert frame.rgb.shape == (3, HEIGHT, WIDTH)
        assert frame.rgb.dtype == torch.uint8
    assert source.losses == []
    assert source.decoder


def test_its_name_tells_what_its_header_does(make: Make) -> None:
    name = make()
    identity = source_identity(name)
    with closing(open_source(name)) as source:
        assert identity == replace(source.info.source, duration_s=None)
        list(source)


def test_its_lasting_name_means_it_from_anywhere(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = make()
    if comes_once(name):
        with pytest.raises(UsageError, match="only once"):
            open_random_access(name)
        return
    monkeypatch.chdir(tmp_path)
    lasting = lasting_name(os.path.relpath(name) if os.path.exists(name) else name)
    monkeypatch.chdir("/")
    with closing(open_source(name)) as source, closing(open_random_access(lasting)) as same:
        assert same.info == source.info


def test_frames_own_their_pixels(make: Make) -> None:
    with closing(open_source(make())) as source:
        frames = list(source)
    addresses = {frame.rgb.data_ptr() for frame in frames}
    assert len(addresses) == COUNT


def test_what_leaves_fewer_than_two_is_refused(make: Make) -> None:
    with pytest.raises(TooFewFramesError), closing(open_source(make(), SelectConfig(start=3, stop=4))) as source:
        list(source)


@pytest.mark.parametrize("select", [SelectConfig(stream=1), SelectConfig(decoder="nvdec")])
def test_a_choice_that_it_does_not_have_is_refused(make: Make, select: SelectConfig) -> None:
    name = make()
    for opening in (open_source, open_random_access):
        with pytest.raises((UsageError, DeviceError)):
            opening(name, select)


def test_a_closed_one_gives_no_more(make: Make) -> None:
    source = open_source(make())
    frames = iter(source)
    next(frames)
    source.close()
    assert len(list(frames)) <= 1
    source.close()  # may be called again


def test_in_any_order_it_gives_the_same(make: Make) -> None:
    name = make()
    with closing(open_source(name, SelectConfig(start=1))) as source:
        assert isinstance(source, RandomAccess) != comes_once(name)
        if comes_once(name):
            return
        expected = {frame.index: frame for frame in source}
    with closing(open_source(make(), SelectConfig(start=1))) as source:
        assert isinstance(source, RandomAccess)
        assert source.wanted == range(1, COUNT)
        for number in (5, 1, 3):
            assert source.standing_before(number) <= number
            with closing(source.pictures_from(number)) as pictures:
                frame = next(picture for picture in pictures if picture.number == number).develop()
            assert torch.equal(frame.rgb, expected[number].rgb)
            assert frame.timestamp_s == expected[number].timestamp_s == source.times_s[number]
