from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from flowreel.engine.scenes.named import named_scene
from flowreel.engine.scenes.outlines import AROUND, BarOutline, radial_outline
from flowreel.engine.scenes.scene import Bend, Layer, Pose, Scene, similarity, stays_visible

Pulled = Callable[[Tensor, Tensor], Tensor]
HEIGHT, WIDTH = 96, 128


def shift(x: float, y: float) -> Pose:
    return lambda t: np.array([[1.0, 0, x * t], [0, 1.0, y * t], [0, 0, 1]])


def placed(x: float, y: float, dx: float = 0, dy: float = 0) -> Pose:
    return lambda t: np.array([[1.0, 0, x + dx * t], [0, 1.0, y + dy * t], [0, 0, 1]])


def plain(value: float, pose: Pose, **fields: object) -> Layer:
    return Layer(torch.full((1, 3, 4, 4), float(value)), 1.0, (2, 2), pose, **fields)  # type: ignore[arg-type]


def test_front_layer_gives_the_flow_and_hides_what_it_passes_over() -> None:
    """A bar 20 px wide and 60 high moves 10 px right over a ground that moves 2 px up."""
    bar = plain(200, placed(50.0, 48.0, dx=10), outline=BarOutline(10.75, 30.75))
    scene = Scene(HEIGHT, WIDTH, (plain(50, shift(0, -2)), bar))
    frame = scene.render(0)
    expected = torch.zeros((HEIGHT, WIDTH), dtype=torch.bool)
    expected[18:79, 40:61] = True
    assert torch.equal(frame[0] > 125, expected)
    edge = functional.max_pool2d(expected[None].float(), 3, 1, 1)[0].bool() & ~expected
    assert frame[:, edge].min() > 50  # a quarter covered by the bar: it shows, but the flow is the ground's
    assert (frame[:, ~expected & ~edge] == 50).all()
    assert (frame[:, expected] == 200).all()

    flow, visible = scene.flow(0, 1)
    assert torch.equal(flow[0], torch.where(expected, 10.0, 0.0))
    assert torch.equal(flow[1], torch.where(expected, 0.0, -2.0))
    hidden = torch.zeros_like(expected)
    hidden[20:81, 61:71] = True  # ground that the bar covers next; it moves up by 2 px
    hidden[79:81, 50:61] = True  # ground that moves under the lower end of the bar
    hidden[:2] = True  # ground that leaves the frame
    assert torch.equal(~visible, hidden)


def test_texels_land_on_pixels_and_tiles_join() -> None:
    tile = torch.rand(1, 3, 16, 20) * 255
    padded = functional.pad(tile, (0, 1, 0, 1), mode="circular")
    endless = Layer(padded, 1.0, (3, 5), shift(1, 0), wraps=True)
    x, y = torch.arange(50), torch.arange(40)
    expected = tile[0][:, (y + 5) % 16][:, :, (x - 7 + 3) % 20]
    assert torch.allclose(endless.draw(7, (0, 40, 0, 50))[0], expected, atol=0.05)
    once = Layer(tile, 1.0, (3, 5), shift(1, 0))
    assert torch.allclose(once.draw(7, (0, 11, 4, 21))[0], tile[0][:, 5:16, 0:17], atol=0.05)
    assert torch.allclose(once.draw(7, (11, 14, 4, 21))[0], tile[0][:, 15:, 0:17].expand(3, 3, 17), atol=0.05)


def test_the_box_follows_what_a_bend_pushes_out() -> None:
    """A bend of zero frequency is a plain shift, here by 6 px to the left and 4 px up."""
    bend = Bend(np.array([[6.0, 4.0]]), np.zeros((1, 2)), np.array([math.pi / 2]), lambda t: t)
    bar = plain(200, placed(50, 40), outline=BarOutline(10.25, 5.25), bend=bend)
    frames = [Scene(HEIGHT, WIDTH, (plain(50, shift(0, 0)), bar)).render(t)[0] for t in (0, 1)]
    assert (frames[0] > 125).sum() == 21 * 11
    assert torch.equal(frames[1][:-4, :-6], frames[0][4:, 6:])


def test_a_layer_outside_the_frame_changes_nothing() -> None:
    ground = plain(50, shift(0, 0))
    alone = Scene(HEIGHT, WIDTH, (ground,)).render(0)
    for x, y in ((-40, 40), (200, 40), (60, -40), (60, 300), (-40, 300)):
        lost = plain(200, placed(x, y), outline=radial_outline(np.full(64, 20.0)))
        assert lost.box(0, HEIGHT, WIDTH) is None
        assert torch.equal(Scene(HEIGHT, WIDTH, (ground, lost)).render(0), alone)


def test_the_box_holds_all_that_is_drawn() -> None:
    """Painting only inside the boxes equals painting everywhere."""

    class Everywhere(Layer):
        def box(self, t: float, height: int, width: int) -> tuple[int, int, int, int]:
            return 0, height, 0, width

    def leaning(t: float) -> np.ndarray:
        return np.array([[1, 0, 60], [0, 1, 40], [0, -0.005, 1]])

    # Soft and thin, in perspective, pushed out by twice 8 px.
    bend = Bend(np.full((2, 2), (0, 8.0)), np.zeros((2, 2)), np.full(2, math.pi / 2), lambda t: -1.0)
    ellipse = radial_outline(4 / np.hypot(0.08 * np.cos(AROUND), np.sin(AROUND)))
    soft = (plain(200, leaning, outline=one, softness=8, bend=bend) for one in (BarOutline(20, 3), ellipse))
    by_hand = [Scene(HEIGHT, WIDTH, (plain(50, shift(0, 0)), layer)) for layer in soft]
    named = named_scene("objects", HEIGHT, WIDTH)
    for scene, t in [(named, 0), (named, 31.5), (named, 77), *((scene, 0) for scene in by_hand)]:
        fields = [{name: getattr(layer, name) for name in Layer.__dataclass_fields__} for layer in scene.layers]
        everywhere = replace(scene, layers=tuple(Everywhere(**values) for values in fields))
        assert torch.equal(scene.render(t), everywhere.render(t))


def test_an_edge_is_as_wide_as_its_softness_at_any_scale() -> None:
    bar = plain(200, lambda t: similarity(60, 48, scale=2.5), outline=BarOutline(16, 100), softness=8)
    _, cover = bar.draw(0, (48, 49, 0, 60))
    assert cover is not None
    assert torch.allclose(cover[0], ((torch.arange(60.0) - 20) / 8 + 0.5).clamp(0, 1), atol=1e-5)


def test_a_flow_ends_at_the_nearest_pixel() -> None:
    """Pixels of layers 0, 0, 2, 0 end a hair outside, behind layer 1, in front of it, and outside."""
    flow = torch.tensor([[-5e-4, 0.6, 0.4, 0.6], [-5e-4, 0, 0, 0]])[:, None]
    owner0, owner1 = torch.tensor([[0, 0, 2, 0]]), torch.tensor([[0, 0, 1, 0]])
    assert stays_visible(flow, owner0, owner1).tolist() == [[True, False, True, False]]


def test_a_bend_is_undone_exactly() -> None:
    bend = Bend(
        np.array([[3.0, 2.0], [-2.0, 1.0]]), np.array([[0.05, 0.02], [0.01, -0.08]]), np.array([0.3, 2.0]), lambda t: t
    )
    along_y = Bend(np.array([[0, 4.0]]), np.array([[0.02, -0.1]]), np.zeros(1), lambda t: t)  # x is right at once
    x, y = torch.rand(2, 40, 50) * 100
    for one, amount in ((along_y, 1.0), (bend, -1.0), (bend, 0.4), (bend, 1.0)):
        qx, qy = one.undo(x, y, amount)
        dx, dy = one.shift(qx, qy, amount)
        assert max((qx + dx - x).abs().max(), (qy + dy - y).abs().max()) < 2e-3
    with pytest.raises(ValueError, match="contraction"):
        replace(bend, strength=bend.strength * 5)


def test_flow_ends_on_the_same_object_point() -> None:
    """A pixel and the end of its flow have the same object coordinates, with bending, rotation and perspective."""
    bend = Bend(np.array([[4.0, 2.0]]), np.array([[0.04, 0.03]]), np.array([0.3]), math.sin)

    def pose(t: float) -> np.ndarray:
        c, s = math.cos(0.1 * t), math.sin(0.1 * t)
        return np.array([[c, -s, 60 + 5 * t], [s, c, 40 - 3 * t], [2e-4 * t, -1e-4 * t, 1.0]])

    layer = plain(0, pose, bend=bend)
    box = (0, 60, 0, 90)
    for t0, t1 in ((0.0, 1.0), (0.7, 2.0), (2.0, 0.5)):
        flow = layer.motion(t0, t1, box).double().numpy()
        end = np.stack((flow[0] + np.arange(90), flow[1] + np.arange(60)[:, None], np.ones((60, 90))))
        q = np.einsum("ij,jyx->iyx", np.linalg.inv(pose(t1)), end)
        qx, qy = torch.from_numpy(q[0] / q[2]), torch.from_numpy(q[1] / q[2])
        dx, dy = bend.shift(qx, qy, math.sin(t1))
        x, y = layer.object_points(t0, box)
        assert max((qx + dx - x).abs().max(), (qy + dy - y).abs().max()) < 5e-3


def test_smooth_pictures_agree_to_a_grey_level(pulled: Pulled) -> None:
    """On a smooth texture interpolation errors are small, so that an error of 0.05 px in the flow would show."""
    ramp = torch.linspace(0, 4 * math.pi, 257)
    texture = 127 + 120 * torch.stack(
        (ramp.sin() + 0 * ramp[:, None], ramp.sin()[:, None] + 0 * ramp, 0 * ramp[:, None] + ramp.cos())
    )
    bend = Bend(
        np.array([[3.0, 2.0], [-1, 2]]), np.array([[0.05, 0.02], [0.01, -0.06]]), np.array([0.3, 1]), lambda t: t
    )
    layer = Layer(texture[None], 1.0, (128, 128), placed(64, 48, 4.3, -2.6), bend=bend, wraps=True)
    scene = Scene(HEIGHT, WIDTH, (layer,))
    (first, _), (second, _) = scene.paint(0.2), scene.paint(1)
    flow, visible = scene.flow(0.2, 1)
    error = (pulled(second, flow) - first).abs().amax(0)[visible]
    assert error.max() < 0.3
    assert (pulled(second, flow + 0.05) - first).abs().amax(0)[visible].max() > 0.2
