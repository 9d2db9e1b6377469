"""Image folders and globs: order, kinds of pixels, sizes, and files that are no images."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowreel.engine.config import SelectConfig
from flowreel.engine.data import Frame
from flowreel.engine.errors import (
    FrameSizeError,
    SourceNotFoundError,
    TooFewFramesError,
    UnsupportedSourceError,
    UsageError,
    frame_of,
)
from flowreel.engine.protocols import Source
from flowreel.engine.sources import lasting_name, open_source, source_stem
from flowreel.engine.sources.images import find_images, read_rgb

WIDTH, HEIGHT = 6, 4


def grey(path: Path, level: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Path:
    Image.new("L", size, level).save(path)
    return path


def gradient() -> np.ndarray:
    """(H, W, 3) uint8, every pixel different."""
    return np.arange(HEIGHT * WIDTH * 3, dtype=np.uint8).reshape(HEIGHT, WIDTH, 3) * 3


def first_levels(frames: list[Frame]) -> list[int]:
    return [int(frame.rgb[0, 0, 0]) for frame in frames]


class TestWhichFiles:
    def test_numbers_count_as_numbers(self, tmp_path: Path) -> None:
        for level, name in ((10, "frame10.png"), (2, "frame2.png"), (1, "Frame1.bmp"), (3, "frame003.png")):
            grey(tmp_path / name, level)
        frames = list(open_source(tmp_path))
        assert first_levels(frames) == [1, 2, 3, 10]
        assert [frame.index for frame in frames] == [0, 1, 2, 3]

    def test_names_of_any_shape_can_be_ordered(self, tmp_path: Path) -> None:
        for name in ("a.png", "a1.png", "1.png", "1a.png", "01.png", "²b3.png"):
            grey(tmp_path / name, 0)
        assert len(find_images(str(tmp_path))) == 6

    def test_folder_takes_images_only(self, tmp_path: Path) -> None:
        for name in ("1.jpg", "2.PNG", "3.webp", "4.tif", "5.ppm", ".6.png"):
            grey(tmp_path / name, 50)
        (tmp_path / "readme.txt").write_text("no image")
        (tmp_path / "7.png").mkdir()
        assert [path.name for path in find_images(str(tmp_path))] == ["1.jpg", "2.PNG", "3.webp", "4.tif", "5.ppm"]

    def test_a_folder_has_the_same_name_from_inside(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Else a store made from ``..`` could be neither resumed nor repaired from elsewhere."""
        for number in range(2):
            grey(tmp_path / f"{number}.png", number)
        (tmp_path / "inside").mkdir()
        monkeypatch.chdir(tmp_path / "inside")
        assert open_source("..").info.source == open_source("../*.png").info.source == open_source(tmp_path).info.source

    def test_glob(self, tmp_path: Path) -> None:
        for number in range(4):
            grey(tmp_path / f"left{number}.png", number)
            grey(tmp_path / f"right{number}.png", 100 + number)
        source = open_source(tmp_path / "right*.png")
        assert source.info.source.name == tmp_path.name
        assert source.info.source.size_bytes == sum(p.stat().st_size for p in tmp_path.glob("right*"))
        assert first_levels(list(source)) == [100, 101, 102, 103]

    @pytest.mark.parametrize("name", ["", "*.png"])
    def test_none_found(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(SourceNotFoundError, match="no images; looked for bmp jpeg jpg pgm png"):
            open_source(tmp_path / name)

    @pytest.mark.parametrize(
        ("name", "inside", "words"),
        [
            ("", "a/10.flo a/2.flo", r"such as 2\.flo, which flowreel export and color take, and info one by one"),
            ("*.flo", "a/10.flo a/2.flo", r"such as 2\.flo, which flowreel export"),
            ("", "a/zarr.json", r"it is a flow store, which flowreel\.open_store reads"),
            ("*.mp4", "a/10.mp4 a/2.mp4", r"2\.mp4 is there, but globs in quotes are for images"),
            ("", "a/10.mp4 a/2.mp4", r"2\.mp4 is there, but a folder is read as the images of one clip"),
            ("", "a/.DS_Store", "ppm tif tiff webp$"),
            ("*.mp4", "", "ppm tif tiff webp$"),
        ],
    )
    def test_what_is_there_instead_is_told(self, tmp_path: Path, name: str, inside: str, words: str) -> None:
        (tmp_path / "a").mkdir()
        for path in inside.split():
            (tmp_path / path).touch()
        with pytest.raises(SourceNotFoundError, match=words):
            open_source(tmp_path / "a" / name)

    def test_one_image_is_too_few(self, tmp_path: Path) -> None:
        with pytest.raises(TooFewFramesError, match=r"alone\.ppm is one image: flow needs at least two.*/\*\.ppm"):
            open_source(grey(tmp_path / "alone.ppm", 0))
        (tmp_path / "film.png").write_bytes(b"\0\0\0\x20ftypisom")
        with pytest.raises(UnsupportedSourceError, match="is not an image"):
            open_source(tmp_path / "film.png")

    @pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
    def test_several_pictures_in_a_file(self, tmp_path: Path, suffix: str) -> None:
        for number in range(2):
            first, *others = (Image.new("RGB", (WIDTH, HEIGHT), (9 * n, number, 0)) for n in range(3))
            first.save(tmp_path / f"{number}.{suffix}", save_all=True, append_images=others, lossless=True)
        source = open_source(tmp_path)
        assert first_levels(list(source)) == [0, 0]
        assert "2 of the files hold more than one picture: of each the first is taken" in source.notes
        with pytest.raises(TooFewFramesError, match="holds several pictures, of which one would be read"):
            open_source(tmp_path / f"0.{suffix}")

    @pytest.mark.parametrize(
        ("numbers", "said"),
        [
            ([1, 2, 3], ""),
            ([0, 5, 10], ""),
            ([1, 2, 4, 5], "have a gap between f2.png and f4.png"),
            ([9, 10, 12, 13, 20], "have 2 gaps, the first between f10.png and f12.png"),
        ],
    )
    def test_gaps_in_the_numbers_are_told(self, tmp_path: Path, numbers: list[int], said: str) -> None:
        for number in numbers:
            grey(tmp_path / f"f{number}.png", 1)
        told = [note for note in open_source(tmp_path).notes if "gap" in note]
        assert len(told) == bool(said)
        assert said in "".join(told)
        assert not any("gap" in note for note in open_source(tmp_path, SelectConfig(stop=2)).notes)
        grey(tmp_path / "other.png", 1)
        assert not any("gap" in note for note in open_source(tmp_path).notes)

    def test_images_of_one_number_are_told(self, tmp_path: Path) -> None:
        for name in ("f1.png", "f1.jpg", "f2.png", "f2.jpg"):
            grey(tmp_path / name, 1)
        expected = "f1.jpg and f1.png bear one number, as do 1 more: both are taken, flow goes from one to the other"
        assert expected in open_source(tmp_path).notes
        assert not any("bear one" in note for note in open_source(str(tmp_path / "*.png")).notes)

    def test_images_of_several_folders_are_told(self, tmp_path: Path) -> None:
        for name in ("a/1.png", "a/2.png", "b/1.png"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            grey(tmp_path / name, 1)
        expected = "the images of 2 folders are one clip: flow also goes from each folder to the next"
        assert expected in open_source(tmp_path / "*" / "*.png").notes
        assert expected not in open_source(tmp_path / "a" / "*.png").notes

    def test_a_link_to_nothing_is_not_left_out(self, tmp_path: Path) -> None:
        for number in (1, 2):
            grey(tmp_path / f"{number}.png", 1)
        (tmp_path / ".3.png").symlink_to("nowhere")  # some editors make such links
        assert len(list(open_source(tmp_path))) == 2
        (tmp_path / "3.png").symlink_to("nowhere")
        for name in (tmp_path, tmp_path / "*.png"):
            with pytest.raises(SourceNotFoundError, match=r"3\.png is a link to a file that is not there"):
                open_source(name)

    def test_a_glob_in_a_folder_whose_name_looks_like_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "[a]" / "clip[1]").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "[a]")
        for number in (1, 2):
            grey(Path(f"clip[1]/{number}.png"), number)
        for name in ("clip[1]/*.png", "clip[1]/[12].png", lasting_name("clip[1]/*.png")):
            assert first_levels(list(open_source(name))) == [1, 2]
            assert source_stem(name) == "clip[1]"
        with pytest.raises(SourceNotFoundError, match="there is no file"):
            open_source("clip[1]/other.mp4")

    @pytest.mark.parametrize("names", [["a", "b", "c"], ["1", "01", "2"]])
    def test_names_that_are_no_sequence_have_no_gaps(self, tmp_path: Path, names: list[str]) -> None:
        for name in names:
            grey(tmp_path / f"{name}.png", 1)
        assert not any("gap" in note for note in open_source(tmp_path).notes)

    def test_real_pair(self, data_dir: Path) -> None:
        source = open_source(data_dir / "pairs" / "chairs_1")
        frames = list(source)
        assert [tuple(frame.rgb.shape) for frame in frames] == [(3, 384, 512)] * 2


class TestHeader:
    def test_info_and_selection(self, tmp_path: Path) -> None:
        for number in range(10):
            grey(tmp_path / f"{number}.png", number)
        source = open_source(tmp_path, SelectConfig(start=1, stop="0.28s", step=2))
        assert isinstance(source, Source)
        info = source.info
        assert (info.width, info.height, info.frame_count, float(info.frame_rate or 0)) == (WIDTH, HEIGHT, 3, 12.5)
        frames = list(source)
        assert [frame.index for frame in frames] == first_levels(frames) == [1, 3, 5]
        assert [frame.timestamp_s for frame in frames] == pytest.approx([0.04, 0.12, 0.2])
        assert source.losses == []
        assert "25 frames per second are assumed" in source.notes[0]

    def test_images_have_no_streams(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="no video stream 1"):
            open_source(tmp_path, SelectConfig(stream=1))
        for number in range(2):
            grey(tmp_path / f"{number}.png", number)
        assert len(list(open_source(tmp_path, SelectConfig(stream=0)))) == 2

    def test_closed_source_gives_no_more(self, tmp_path: Path) -> None:
        for number in range(3):
            grey(tmp_path / f"{number}.png", number)
        source = open_source(tmp_path)
        frames = iter(source)
        next(frames)
        source.close()
        assert list(frames) == []


class TestTrouble:
    def test_sizes_differ(self, tmp_path: Path) -> None:
        grey(tmp_path / "1.png", 0)
        grey(tmp_path / "2.png", 0, (8, 4))
        with pytest.raises(FrameSizeError, match=r"2\.png is 8x4, but 1\.png is 6x4"):
            open_source(tmp_path)

    @pytest.mark.parametrize(("content", "says"), [(b"", "is empty"), (b"hello" * 20, "is not an image")])
    def test_no_image_inside(self, tmp_path: Path, content: bytes, says: str) -> None:
        grey(tmp_path / "1.png", 0)
        (tmp_path / "2.png").write_bytes(content)
        with pytest.raises(UnsupportedSourceError, match=rf"2\.png {says}"):
            open_source(tmp_path)

    @pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "bmp"])
    def test_cut_file(self, tmp_path: Path, suffix: str) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
        for number in (1, 2):
            Image.fromarray(noise).save(tmp_path / f"{number}.{suffix}")
        path = tmp_path / f"2.{suffix}"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(UnsupportedSourceError, match=rf"2\.{suffix} "):
            list(open_source(tmp_path))

    def test_a_file_that_cannot_be_decoded_concerns_its_own_frame(self, tmp_path: Path) -> None:
        """The error names the frame that fails, not the one before it, which was the last to come."""
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
        for number in range(6):
            Image.fromarray(noise).save(tmp_path / f"{number}.png")
        (tmp_path / "4.png").write_bytes((tmp_path / "4.png").read_bytes()[:2000])
        with pytest.raises(UnsupportedSourceError, match=r"4\.png cannot be decoded") as caught:
            list(open_source(tmp_path, SelectConfig(step=2)))
        assert frame_of(caught.value, None) == 4

    def test_floating_point_pixels(self, tmp_path: Path) -> None:
        Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "1.tif")
        with pytest.raises(UnsupportedSourceError, match="floating point"):
            read_rgb(tmp_path / "1.tif")


class TestPixels:
    @pytest.mark.parametrize("suffix", ["png", "bmp", "ppm", "tif", "webp"])
    def test_rgb_is_kept(self, tmp_path: Path, suffix: str) -> None:
        Image.fromarray(gradient()).save(tmp_path / f"a.{suffix}", lossless=True)
        assert np.array_equal(read_rgb(tmp_path / f"a.{suffix}"), gradient())

    @pytest.mark.parametrize("suffix", ["png", "pgm", "tif"])
    def test_16_bit_grey_is_scaled(self, tmp_path: Path, suffix: str) -> None:
        values = np.array([[0, 255, 256], [0x1234, 0xFEDC, 0xFFFF]], np.uint16)
        Image.fromarray(values).save(tmp_path / f"a.{suffix}")
        rgb = read_rgb(tmp_path / f"a.{suffix}")
        assert rgb.shape == (2, 3, 3)
        assert np.array_equal(rgb[..., 0], values >> 8)
        assert np.array_equal(rgb[..., 0], rgb[..., 2])

    def test_grey_beyond_16_bits_is_cut_off(self, tmp_path: Path) -> None:
        Image.fromarray(np.array([[-70000, -1, 0x1234, 1 << 16, 1 << 30]], np.int32)).save(tmp_path / "a.tif")
        assert read_rgb(tmp_path / "a.tif")[0, :, 0].tolist() == [0, 0, 0x12, 255, 255]

    def test_16_bit_rgb_is_scaled(self, tmp_path: Path) -> None:
        import cv2

        values = np.random.default_rng(0).integers(0, 1 << 16, (5, 7, 3)).astype(np.uint16)
        cv2.imwrite(str(tmp_path / "a.png"), values[..., ::-1])
        assert np.abs(read_rgb(tmp_path / "a.png").astype(int) - (values >> 8)).max() <= 1

    @pytest.mark.parametrize("mode", ["RGBA", "LA"])
    def test_alpha_is_dropped(self, tmp_path: Path, mode: str) -> None:
        image = Image.fromarray(gradient()).convert(mode)
        image.putalpha(Image.fromarray(gradient()[..., 0]))
        image.save(tmp_path / "a.png")
        expected = gradient() if mode == "RGBA" else np.asarray(Image.fromarray(gradient()).convert("L").convert("RGB"))
        assert np.array_equal(read_rgb(tmp_path / "a.png"), expected)

    @pytest.mark.parametrize("transparency", [None, 0, bytes([0, 128, 255])])
    def test_palette(self, tmp_path: Path, transparency: int | bytes | None) -> None:
        image = Image.new("P", (3, 1))
        image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
        image.putdata([0, 1, 2])
        image.save(tmp_path / "a.png", **({} if transparency is None else {"transparency": transparency}))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_rgb(tmp_path / "a.png").tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]

    def test_one_bit(self, tmp_path: Path) -> None:
        Image.fromarray(np.array([[True, False]])).save(tmp_path / "a.png")
        assert read_rgb(tmp_path / "a.png").tolist() == [[[255] * 3, [0] * 3]]

    def test_cmyk(self, tmp_path: Path) -> None:
        Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
        assert np.abs(read_rgb(tmp_path / "a.jpg").astype(int) - (255, 0, 0)).max() <= 4

    @pytest.mark.parametrize("orientation", range(1, 10))  # 9 is invalid
    @pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
    def test_exif_orientation(self, tmp_path: Path, suffix: str, orientation: int) -> None:
        stored = np.kron(np.array([[0, 90, 180], [250, 40, 130]], np.uint8), np.ones((16, 16), np.uint8))
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"jpg": {"quality": 95}, "webp": {"lossless": True}}.get(suffix, {})
        path = tmp_path / f"1.{suffix}"
        Image.fromarray(stored).save(path, exif=exif, **options)
        # The tag states where row 0 and column 0 of the stored picture are when it is shown.
        upright = {
            1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1],
            5: stored.T, 6: stored.T[:, ::-1], 7: stored.T[::-1, ::-1], 8: stored.T[::-1], 9: stored,
        }[orientation]  # fmt: skip
        assert np.abs(read_rgb(path)[..., 1].astype(int) - upright).max() <= 4
        (tmp_path / f"2.{suffix}").write_bytes(path.read_bytes())
        info = open_source(tmp_path).info
        assert (info.height, info.width) == upright.shape

    def test_frames_own_their_pixels(self, tmp_path: Path) -> None:
        for number in (1, 2):
            Image.fromarray(gradient()).save(tmp_path / f"{number}.png")
        first, second = open_source(tmp_path)
        first.rgb.zero_()  # it is writable and shares no memory
        assert np.array_equal(second.rgb.permute(1, 2, 0).numpy(), gradient())


def test_png_with_its_orientation_behind_the_pixels(tmp_path: Path) -> None:
    """The header check and the reader both ignore such a tag, so that the sizes agree."""
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(gradient()).save(buffer, "png", exif=exif)
    data = buffer.getvalue()
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    closing = data.index(b"IEND") - 4
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(data[:start] + data[end:closing] + data[start:end] + data[closing:])
    source = open_source(tmp_path)
    assert (source.info.width, source.info.height) == (WIDTH, HEIGHT)
    assert np.array_equal(next(iter(source)).rgb.permute(1, 2, 0).numpy(), gradient())
