"""The packages that every run needs, each tried on a small piece of the work that it is there for."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Literal

from flowreel.engine.doctor.checking import Finding, expect
from flowreel.engine.errors import counted

# Codec -> FFmpeg's decoders for it on a CPU; the decoder that FFmpeg calls av1 needs a GPU.
DECODERS = {"h264": ["h264"], "hevc": ["hevc"], "av1": ["libdav1d", "libaom-av1"], "vp9": ["vp9"], "mpeg4": ["mpeg4"]}
H264_ENCODERS = ("libx264", "libopenh264")


def torch() -> Finding:
    import torch

    expect(torch.nn.functional.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)) == 9, "a convolution is wrong")
    built = "built without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
    onednn = "" if torch.backends.mkldnn.is_available() else ", without oneDNN: slow on a CPU"  # type: ignore[no-untyped-call]
    return Finding("ok", torch.__version__, f"{built}, {counted(torch.get_num_threads(), 'thread')}{onednn}")


def pyav() -> Finding:
    import av

    library = ".".join(map(str, av.library_versions["libavcodec"]))
    return Finding("ok", av.__version__, f"FFmpeg {av.ffmpeg_version_info}, libavcodec {library}")


def decoders() -> Finding:
    absent = [codec for codec, names in DECODERS.items() if not _has_codec(names, "r")]
    there = ", ".join(codec for codec in DECODERS if codec not in absent)
    lacking = f"; cannot decode {', '.join(absent)}" if absent else ""
    return Finding("missing" if "h264" in absent else "ok", detail=there + lacking)


def encoders() -> Finding:
    found = [name for name in (*H264_ENCODERS, "mpeg4") if _has_codec((name,), "w")]
    only = "; no H.264: colour videos become MPEG-4" if found == ["mpeg4"] else ""
    return Finding("ok" if found else "missing", detail=", ".join(found) + only)


def _has_codec(names: Sequence[str], mode: Literal["r", "w"]) -> bool:
    import av

    for name in names:
        try:
            av.Codec(name, mode)
        except ValueError:
            continue
        return True
    return False


def zarr() -> Finding:
    import numpy as np
    import zarr
    from zarr.storage import MemoryStore

    array = zarr.create_array(MemoryStore(), shape=(4, 4), chunks=(1, 4), shards=(2, 4), dtype="int16", zarr_format=3)
    array[:] = np.arange(16).reshape(4, 4)
    expect(array[3, 3] == 15, "an array in memory does not keep its values")
    return Finding("ok", zarr.__version__)


def blosc() -> Finding:
    import numcodecs
    from numcodecs.blosc import Blosc

    _round_trip(Blosc("zstd", shuffle=Blosc.BITSHUFFLE))
    return Finding("ok", numcodecs.__version__)


def pcodec() -> Finding:
    import pcodec  # noqa: F401 (numcodecs would hide which of the two is absent)
    from numcodecs.pcodec import PCodec

    _round_trip(PCodec())
    return Finding("ok", version("pcodec"))


def crc32c() -> Finding:
    import google_crc32c

    expect(google_crc32c.value(b"123456789") == 0xE3069283, "a checksum is wrong")
    slow = "" if google_crc32c.implementation == "c" else "in plain Python: slow"
    return Finding("ok", version("google-crc32c"), slow)


def zstandard() -> Finding:
    import zstandard

    blocks = zstandard.ZstdCompressor().multi_compress_to_buffer([bytes(1000), bytes(range(256))], threads=2)
    back = [zstandard.ZstdDecompressor().decompress(block.tobytes()) for block in blocks]  # type: ignore[attr-defined]
    expect(back == [bytes(1000), bytes(range(256))], "what was compressed does not come back")
    return Finding("ok", zstandard.__version__)


def _round_trip(codec: Any) -> None:
    import numpy as np

    values = (np.arange(4096) % 97).astype(np.int16)
    back = np.frombuffer(codec.decode(codec.encode(values)), np.int16)
    expect(np.array_equal(back, values), "what was compressed does not come back")


def pillow() -> Finding:
    import PIL
    from PIL import Image

    picture = io.BytesIO()
    Image.new("RGB", (2, 2), (1, 2, 3)).save(picture, "png")
    expect(Image.open(picture).getpixel((1, 1)) == (1, 2, 3), "a PNG does not come back")
    return Finding("ok", PIL.__version__)


def baseline() -> Finding:
    """Loads the shipped weights and computes the flow of one 64x64 pair."""
    import torch

    from flowreel.engine.models.weights import instantiate, read_weights

    weights = read_weights("baseline")
    with torch.no_grad():
        frames = torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255
        flow = instantiate(weights).eval()(*frames)
    expect(flow.isfinite().all(), "the flow of a small pair is not finite")
    about = f"{weights.model}, width {weights.width:g}, sha256 {weights.sha256}"
    return Finding("ok", f"version {weights.made_by.get('version', '?')}", about)
