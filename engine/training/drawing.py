"""Draws the parameters of random scenes at two moments: camera, background, objects, their motions, light and noise.

``draw_pair`` draws them from one seed, by the distributions of ``SceneConfig``. Nothing is painted here: ``pairs.py``
paints one pair on the host, ``painting.py`` many at once on a GPU.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from flowreel.engine.scenes.outlines import Outline, random_outline
from flowreel.engine.scenes.scene import Bend, Matrix, Pose, inverse, similarity
from flowreel.engine.scenes.textures import LEVELS, TATTER_SIZE, TATTERS, Rng, TextureBank, kind_of

HAZE = (3, 4)  # rows and columns of the coarse grid that haze is interpolated from


Bank = tuple[int, int, int]  # seed, count, size of a ``TextureBank``


@dataclass(frozen=True)
class SceneConfig:
    """The distributions of ``draw_pair``. Speeds are px a frame at 256 x 192 px and scale with the frame's diagonal."""

    objects: tuple[int, int] = (0, 6)  # fewest and most moving layers in front of the background
    median_px: float = 5.0  # median speed of the pairs; about 0.8 for a network for small motions
    spread: float = 0.9  # standard deviation of the logarithm of a pair's speed: many below 1 px, a tail past 40
    max_px: float = 48.0  # cap of the camera's speed, and of each object's own; followers of the camera add the two
    still: float = 0.10  # share of pairs whose background does not move at all
    follow: float = 0.60  # share of objects that follow the camera's motion in addition to their own
    bends: float = 0.25  # share of layers that also deform
    photometric: float = 0.6  # strength of lighting changes and noise; 0: clean pictures, without blur and fog too
    motion_blur: float = 0.04  # share of pairs with an open shutter
    bank: Bank = (0, 48, 512)


@dataclass(frozen=True, eq=False)
class Piece:
    """Where a layer's colours come from: a part of one texture of the bank, recoloured."""

    texture: int  # its index in the bank
    level: int  # of its pyramid
    texels: float  # texels of that level per object px
    corner: tuple[int, int]  # texel (left, top) of the part, which wraps around the texture's borders
    size: tuple[int, int]  # texels (height, width) of the part
    origin: tuple[int, int]  # texel (x, y) of the part that lies at object (0, 0)
    gain: Matrix  # (3, 3) float64
    wanted: Matrix  # (3,) float64, the colour that a grey of the texture's mean value maps to; hues turn with ``gain``
    tatters: tuple[int, int, int] | None  # field of ``textures.tatters`` that cuts holes, and its texel (top, left)

    def offset(self, bank: TextureBank) -> Matrix:
        """(3,) float64, to be added to the colours after ``gain``."""
        return np.asarray(self.wanted - self.gain @ np.full(3, bank.grey(self.texture)))


@dataclass(frozen=True, eq=False)
class DrawnLayer:
    """A surface; the fields after ``piece`` are those of ``scenes.scene.Layer``."""

    piece: Piece
    pose: Pose
    outline: Outline | None = None
    softness: float = 1.0
    bend: Bend | None = None


@dataclass(frozen=True, eq=False)
class Development:
    """Effects of light, lens and sensor on the two frames: mostly the same for both, with small differences."""

    haze: Matrix | None  # HAZE, opacities 0..0.7 that vary slowly over the frame, fixed to it
    haze_grey: float  # 0..255: fog; 0: a shadow
    blur: float  # weight of each neighbour along both axes; 0: sharp
    gain: Matrix  # (2, 3) of each frame's colour channels
    offset: Matrix  # (2, 3)
    gamma: Matrix  # (2,) exponents; 1: none
    grain: float  # standard deviation of the noise
    grain_at: tuple[float, float]  # where each frame's window into the precomputed noise begins, 0..1


@dataclass(frozen=True, eq=False)
class DrawnPair:
    """All that is random about a pair. Frames are at times 0 and 1; at 0 nothing is bent and the camera at rest."""

    height: int  # px
    width: int  # px
    bank: Bank  # that holds the layers' textures
    layers: tuple[DrawnLayer, ...]  # from back to front
    moments: tuple[float, ...]  # further moments at which the shutter is open, relative to each time, in frames
    development: Development | None  # None: the pictures stay clean


def draw_pair(seed: int, height: int, width: int, config: SceneConfig | None = None) -> DrawnPair:
    """A random scene at times 0 and 1. The same seed, size and config give the same pair."""
    config = config or SceneConfig()
    rng = np.random.default_rng((seed, 1))
    layers, speed = _random_layers(rng, height, width, config)
    shutter = rng.uniform(0.15, 0.5) if rng.random() < config.motion_blur else 0.0
    # About one picture for every two pixels of motion at that speed while the shutter is open.
    steps = min(max(round(shutter * speed / 4), 1), 4) if shutter else 0
    moments = tuple(np.linspace(-shutter / 2, shutter / 2, 2 * steps).tolist())
    development = _development(rng, config.photometric) if config.photometric > 0 else None
    return DrawnPair(height, width, config.bank, layers, moments, development)


def _random_layers(rng: Rng, height: int, width: int, config: SceneConfig) -> tuple[tuple[DrawnLayer, ...], float]:
    """The layers, and the speed in px a frame around which their speeds were drawn."""
    zoom = math.hypot(height, width) / 320
    fastest = config.max_px * zoom
    speed = min(config.median_px * zoom * math.exp(config.spread * rng.normal()), fastest)
    camera_speed = 0.0 if rng.random() < config.still else min(speed * math.exp(0.5 * rng.normal()), fastest)
    camera = _camera(rng, height, width, camera_speed)
    layers = [_background(rng, height, width, config, camera, camera_speed)]
    for _ in range(int(rng.integers(config.objects[0], config.objects[1] + 1))):
        own = min(speed * math.exp(0.8 * rng.normal() - 0.1), fastest)
        layers.append(_object(rng, height, width, config, camera if rng.random() < config.follow else _stay, own))
    return tuple(layers), speed


def _stay(t: float) -> Matrix:
    return np.eye(3)


def _spin(rng: Rng, speed: float, radius: float, most: float, share: float) -> float:
    """A rate of rotation or zoom, 1/frame, that moves points at ``radius`` by about ``share * speed`` px."""
    return float(np.clip(rng.normal() * share * speed / radius, -most, most))


def _camera(rng: Rng, height: int, width: int, speed: float) -> Pose:
    """Pan, rotation, zoom and a little perspective, growing from the identity at time 0."""
    direction, radius = rng.uniform(0, 2 * np.pi), 0.35 * math.hypot(height, width)
    pan = speed * rng.uniform(0.5, 1.1)
    dx, dy = pan * math.cos(direction), pan * math.sin(direction) * 0.8  # cameras pan more than they tilt
    turn, zoom = _spin(rng, speed, radius, 0.27, 0.6), _spin(rng, speed, radius, 0.15, 0.6)
    lean = np.clip(rng.normal(0, 0.25 * speed / radius**2, 2), -0.1 / radius, 0.1 / radius) * (rng.random() < 0.5)
    px, py = width * rng.uniform(0.25, 0.75), height * rng.uniform(0.25, 0.75)

    def pose(t: float) -> Matrix:
        if speed == 0:
            return np.eye(3)
        move = similarity(px + dx * t, py + dy * t, turn * t, math.exp(zoom * t))
        move[2, :2] = lean * t  # small, so that the horizon stays well outside the frame
        move[:2] += np.outer((px, py), move[2]) - np.outer((px, py), (0, 0, 1))
        return np.asarray(move @ similarity(-px, -py))

    return functools.lru_cache(4)(pose)


def _random_bend(rng: Rng, speed: float, size: float) -> Bend:
    """Two or three slow waves with wavelengths around ``size`` px and amplitude 0 at time 0."""
    count = int(rng.integers(2, 4))
    length = size * np.exp(rng.uniform(-0.5, 0.9, count))
    heading, side = rng.uniform(0, 2 * np.pi, (2, count))
    if rng.random() < 0.4:  # all along one direction, like the parallax of uneven ground
        side[:] = side[0]
    wave = np.stack((np.cos(heading), np.sin(heading)), 1) * (2 * np.pi / length)[:, None]
    strongest = 0.3 / count * length / (2 * np.pi)
    strength = np.minimum(speed * rng.uniform(0.05, 0.5, count), strongest)
    return Bend(
        np.stack((np.cos(side), np.sin(side)), 1) * strength[:, None],
        wave,
        rng.uniform(0, 2 * np.pi, count),
        lambda t: t,
    )


def _recolouring(rng: Rng) -> tuple[Matrix, Matrix]:
    """``gain`` and ``wanted`` of a ``Piece``: hue, saturation and contrast, and a mean at which little is clipped."""
    hue, saturation = rng.uniform(-np.pi, np.pi) * (rng.random() < 0.6), rng.uniform(0.3, 1.3)
    axis = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turn = axis + saturation * (math.cos(hue) * (np.eye(3) - axis) + math.sin(hue) * cross)
    gain = math.exp(rng.normal(-0.05, 0.3)) * turn
    return gain, np.clip(rng.normal(118, 42), 30, 225) + rng.normal(0, 8, 3)


def _pick(rng: Rng, count: int, ground: bool) -> int:
    """Index of one of ``count`` textures. A calm background shows little of its motion, so it is drawn less often."""
    index = int(rng.integers(count))
    return int(rng.integers(count)) if ground and kind_of(index) == "calm" else index


def _piece(
    rng: Rng, count: int, box: tuple[float, float, float, float], *, ground: bool = False, holes: bool = False
) -> Piece:
    """A recoloured piece of a random texture that covers ``box`` (left, top, right, bottom; object px)."""
    texels = math.exp(rng.uniform(math.log(0.45), math.log(2.8)))
    level = min(max(math.ceil(math.log2(texels)), 0), LEVELS - 1)  # at most one texel per pixel, to avoid aliasing
    texels /= 2**level
    left, top = math.floor(box[0] * texels) - 1, math.floor(box[1] * texels) - 1
    width, height = math.ceil(box[2] * texels) + 2 - left, math.ceil(box[3] * texels) + 2 - top
    texture, corner = _pick(rng, count, ground), rng.integers(0, 1 << 16, 2)
    gain, wanted = _recolouring(rng)
    tatters = None
    if holes and rng.random() < 0.15:
        number, down, right = rng.integers((TATTERS, TATTER_SIZE, TATTER_SIZE)).tolist()
        tatters = number, down, right
    corner_x, corner_y = corner.tolist()
    return Piece(texture, level, texels, (corner_x, corner_y), (height, width), (-left, -top), gain, wanted, tatters)


def _background(rng: Rng, height: int, width: int, config: SceneConfig, camera: Pose, speed: float) -> DrawnLayer:
    base = similarity(width / 2, height / 2, rng.uniform(0, 2 * np.pi))
    bend = _random_bend(rng, speed, 0.6 * width) if rng.random() < config.bends else None
    corners = np.array([[0, width, 0, width], [0, 0, height, height], [1, 1, 1, 1]], dtype=np.float64)
    seen = np.concatenate([inverse(camera(t) @ base) @ corners for t in (0.0, 1.0)], axis=1)
    x, y = seen[:2] / seen[2]
    margin = 2 + (bend.reach if bend else 0)
    bounds = (x.min() - margin, y.min() - margin, x.max() + margin, y.max() + margin)
    piece = _piece(rng, config.bank[1], bounds, ground=True)
    return DrawnLayer(piece, functools.lru_cache(4)(lambda t: camera(t) @ base), bend=bend)


def _object(rng: Rng, height: int, width: int, config: SceneConfig, camera: Pose, speed: float) -> DrawnLayer:
    short = min(height, width)
    radius = float(np.clip(short * math.exp(rng.normal(math.log(0.17), 0.65)), 0.03 * short, 0.6 * short))
    x, y = width * rng.uniform(-0.1, 1.1), height * rng.uniform(-0.1, 1.1)
    heading, angle = rng.uniform(0, 2 * np.pi, 2)
    dx, dy = speed * math.cos(heading), speed * math.sin(heading)
    turn, zoom = _spin(rng, speed, radius, 0.33, 0.4), _spin(rng, speed, radius, 0.15, 0.3)
    bend = _random_bend(rng, speed, 2 * radius + 20) if rng.random() < config.bends else None
    outline = random_outline(rng, radius)
    softness = float(rng.choice([1.0, 1.5, 3.0], p=[0.7, 0.2, 0.1]))
    wide, tall = (side + 2 * softness for side in outline.extent)  # a soft edge extends somewhat beyond the outline
    return DrawnLayer(
        _piece(rng, config.bank[1], (-wide, -tall, wide, tall), holes=radius > 12),
        functools.lru_cache(4)(
            lambda t: camera(t) @ similarity(x + dx * t, y + dy * t, angle + turn * t, math.exp(zoom * t))
        ),
        outline=outline,
        softness=softness,
        bend=bend,
    )


def _development(rng: Rng, strength: float) -> Development:
    """``strength``: of all effects except haze and blur."""
    haze, grey, blur = None, 0.0, 0.0
    if rng.random() < 0.12:
        haze = rng.uniform(0, rng.uniform(0.2, 0.7), HAZE)
        grey = float(rng.uniform(0, 255)) if rng.random() < 0.6 else 0.0
    if rng.random() < 0.2:
        blur = rng.uniform(0.08, 0.3)
    contrast = math.exp(strength * rng.normal(0, 0.15))
    gamma = math.exp(strength * rng.normal(0, 0.3)) if rng.random() < 0.3 else 1.0
    brightness = strength * (rng.normal(0, 12) + rng.normal(0, 4, 3))
    grain = strength * float(rng.exponential(2.5)) if rng.random() < 0.8 else 0.0
    gain = contrast * np.exp(strength * (rng.normal(0, 0.02, (2, 1)) + rng.normal(0, 0.008, (2, 3))))
    offset = brightness + strength * rng.normal(0, 2, (2, 1)) + 128 * (1 - gain)
    gammas = gamma * np.exp(strength * rng.normal(0, 0.02, 2)) if gamma != 1 else np.ones(2)
    first_at, second_at = rng.random(2).tolist()
    return Development(haze, grey, blur, gain, offset, gammas, grain, (first_at, second_at))
