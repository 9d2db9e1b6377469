"""``flowreel info``: what files are, for a person or, with ``--json``, for a script."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from flowreel.engine.cli import printable, say, told
from flowreel.engine.cli.options import Debug
from flowreel.engine.cli.table import beside_flo, size
from flowreel.engine.errors import counted

Facts = dict[str, Any]
Rows = list[tuple[str, str]]  # label, text; rows without text are left out
Group = tuple[str, Rows]  # heading, the rows under it

FLOW_KINDS = {"flo": "Middlebury .flo", "kitti": "KITTI's 16-bit PNG", "npz": "NumPy .npz"}


def info(
    path: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH",
            help="Videos, image folders or quoted globs, synthetic:NAME, flow files (.flo, .kitti.png, .npz), "
            "flow stores (complete or not) or weights.",
            show_default=False,
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for scripts: a list for several PATHs.")] = False,
    debug: Debug = False,
) -> None:
    """Show what videos, images, flow files, flow stores or weights contain."""
    from flowreel.engine.describe import describe

    answers: list[Facts] = []
    for name in path:
        try:
            facts = describe(name)
        except Exception as error:
            if len(path) == 1 or debug:
                raise
            message, code = told(error)
            facts = {"path": name, "error": " ".join(message.split())}
            say(message, code)
        answers.append(facts)
        if not as_json and "error" not in facts:
            print_facts(facts, follows=len(answers) > 1)
    if as_json:
        typer.echo(json.dumps(answers if len(path) > 1 else answers[0], indent=2, allow_nan=False))
    if any("error" in facts for facts in answers):
        raise typer.Exit(1)


def print_facts(facts: Facts, follows: bool = False) -> None:
    """Headings and aligned rows on stdout; colours only on a terminal, and no line is wrapped."""
    console = Console(soft_wrap=True, highlight=False)
    groups = [(printable(heading), [_shown(row) for row in rows if row[1]]) for heading, rows in _groups(facts)]
    width = max(len(label) for _, rows in groups for label, _ in rows)
    for number, (heading, rows) in enumerate(groups):
        console.print(Text(("\n" if follows and not number else "") + ("  " if number else "") + heading, "bold"))
        for label, text in rows:
            style = "yellow" if label in ("note", "problem") else ""
            console.print(Text.assemble("    " if number else "  ", (label.ljust(width), "dim"), "  ", (text, style)))


def _shown(row: tuple[str, str]) -> tuple[str, str]:
    return printable(row[0]), printable(row[1])


def _groups(facts: Facts) -> Iterator[Group]:
    """The rows printed for one path: first those of the whole, then those of its parts."""
    kind = facts.get("kind")
    notes = [("note", note) for note in facts.get("notes", [])]
    if kind == "video":
        yield f"{facts['path']}: video, {facts['format_name']}", _video_rows(facts) + notes
        for stream in facts["streams"]:
            yield _stream_heading(stream), _stream_rows(stream)
    elif kind == "store":
        yield f"{facts['folder']}: {_store_words(facts)}", _store_rows(facts) + notes
        yield from _other_groups({key: facts[key] for key in ("source", "made_by")})
    elif kind in FLOW_KINDS:
        yield f"{facts['path']}: flow, {FLOW_KINDS[kind]}", _flow_rows(facts)
    else:
        plain = {key: value for key, value in facts.items() if key not in ("path", "kind", "name", "notes")}
        made_by = plain.pop("made_by", None)
        yield f"{facts['path']}: {kind}", _other_rows(plain) + notes
        yield from _other_groups({"made_by": made_by})


# -- Videos ------------------------------------------------------------------------------------------------------


def _video_rows(facts: Facts) -> Rows:
    start = "" if facts["start_time_s"] is None else f", starting at {facts['start_time_s']:.3f} s"
    rate = "" if facts["bit_rate"] is None else f", {facts['bit_rate'] / 1e6:.3g} Mbit/s"
    duration = "unknown" if facts["duration_s"] is None else f"{facts['duration_s']:.3f} s"
    whole = "cut short" if facts["cut_short"] else ""
    flows, stream = counted(facts["flows"], "flow"), facts["stream_used"]
    flow = f"{flows} of {facts['width']}x{facts['height']} from stream {stream}"
    return [
        ("duration", duration + start),
        ("size", size(facts["size_bytes"]) + rate),
        ("state", whole),
        ("flow", f"{flow}, {facts['frame_rate']:.6g} frames/s, decoded by {facts['decoder']}"),
    ]


def _stream_heading(stream: Facts) -> str:
    codec = stream["codec"] or "of a codec that FFmpeg cannot decode"
    profile = f" ({stream['profile']})" if stream["profile"] else ""
    language = f", {stream['language']}" if stream["language"] else ""
    used = ", the one that run takes" if stream.get("used") else ""
    number = f", --stream {stream['number']}" if stream.get("number") is not None and not used else ""
    cover = ", a cover picture" if stream.get("cover") else ""
    return f"stream {stream['index']}: {stream['type']}, {codec}{profile}{language}{used}{number}{cover}"


def _stream_rows(stream: Facts) -> Rows:
    rows: Rows = [("bit rate", f"{stream['bit_rate'] / 1e3:.0f} kbit/s" if stream["bit_rate"] else "")]
    if "sample_rate" in stream:
        rows += [("sound", f"{stream['sample_rate']} Hz, {stream['channels']} channels ({stream['layout']})")]
    if "problem" in stream:
        rows += [("problem", stream["problem"])]
    if "pixel_format" not in stream:
        return rows
    nominal = "" if stream["nominal_rate"] is None else f" (nominally {stream['nominal_rate']:.6g})"
    return [
        *rows,
        ("pixels", f"{stream['pixel_format']}, {stream['bit_depth']} bits"),
        ("picture", _size_words(stream)),
        ("frames", f"{stream['frames']}, giving {counted(stream['flows'], 'flow')}"),
        ("rate", f"{stream['average_rate']:.6g} frames/s{nominal}{_gap_words(stream)}"),
        ("shown", f"from {stream['first_frame_s']:.3f} s to {stream['last_frame_s']:.3f} s"),
        ("key frames", _key_words(stream)),
        ("colour", _colour_words(stream["colour"])),
    ]


def _size_words(stream: Facts) -> str:
    turned = ""
    if stream["mirrored"]:
        turned += ", mirrored left to right"
    if stream["rotation"]:
        way = "" if stream["rotation"] == 180 else " clockwise" if stream["rotation"] < 0 else " counterclockwise"
        turned += f", turned by {abs(stream['rotation'])} degrees{way}"
    if turned:
        turned += f": {stream['width']}x{stream['height']}"
    words = f"{stream['stored_width']}x{stream['stored_height']} stored{turned}"
    if stream["sample_aspect_ratio"] == "1:1":
        return f"{words}; square pixels"
    shown = f"{stream['display_width']}x{stream['display_height']}"
    return f"{words}; pixels of {stream['sample_aspect_ratio']}, which players show as {shown}"


def _gap_words(stream: Facts) -> str:
    if stream["constant_rate"] is None:
        return ""
    kind = "constant" if stream["constant_rate"] else "variable"
    low, high = (f"{1e3 * stream[key]:.3f}" for key in ("smallest_gap_s", "largest_gap_s"))
    return f", {kind}: frames are {low} ms apart" if low == high else f", {kind}: frames are {low} to {high} ms apart"


def _key_words(stream: Facts) -> str:
    gap = stream["largest_key_gap_s"]
    return str(stream["key_frames"]) + ("" if gap is None else f", at most {gap:.3f} s apart")


def _colour_words(colour: Facts) -> str:
    def stated(name: str) -> str:
        if colour[name] is not None:
            return f"{name} {colour[name]}"
        assumed = colour.get(f"used_{name}")
        return f"{name} not stated" + (f" (taken as {assumed})" if assumed else "")

    return ", ".join(map(stated, ("range", "matrix", "primaries", "transfer")))


# -- Flow and the rest -------------------------------------------------------------------------------------------


def _store_words(facts: Facts) -> str:
    if not facts["cache"]:
        return "flow store, " + ("complete" if facts["complete"] else "unfinished")
    return "cache of lazy flow, " + ("full" if facts["complete"] else f"{facts['available'] / facts['flows']:.0%} full")


def _store_rows(facts: Facts) -> Rows:
    bound = f"within {facts['max_error']:g} px" if facts["max_error"] else "lossless"
    ratio = beside_flo(facts["flo_bytes"], facts["disk_bytes"])
    model = " ".join(str(facts[key]) for key in ("model", "weights") if facts[key])
    shown = {"kind", "path", "folder", "complete", "flows", "available", "width", "height", "dtype", "codec"}
    shown |= {"cache", "max_error", "step", "disk_bytes", "flo_bytes", "ratio", "model", "weights"}
    shown |= {"source", "made_by", "notes"}
    if facts["cache"]:
        shown |= {"shard_length", "resolution"}  # always one and full
    return [
        ("flows", f"{facts['available']} of {facts['flows']}, {facts['width']}x{facts['height']}"),
        ("size", size(facts["disk_bytes"]) + ratio),
        ("stored as", f"{facts['dtype']}, {facts['codec']}, {bound}"),
        ("model", model),
        *_other_rows({key: value for key, value in facts.items() if key not in shown}),
    ]


def _flow_rows(facts: Facts) -> Rows:
    import numpy as np

    def vector(key: str) -> str:
        """float32 numbers, each with the fewest digits that identify it."""
        parts = facts[key] or []
        return ", ".join("NaN" if part is None else str(np.float32(part)) for part in parts)

    lengths = ""
    if facts["mean_length"] is not None:
        lengths = f"{facts['mean_length']:.3f} px on average, {facts['max_length']:.3f} px at most"
    return [
        ("tag", facts.get("tag", "")),
        ("picture", f"{facts['width']}x{facts['height']}"),
        ("first vector", vector("first_vector")),
        ("smallest", vector("min")),
        ("largest", vector("max")),
        ("length", lengths),
        ("unknown", f"{facts['unknown']} of {facts['width'] * facts['height']} vectors"),
        *_other_rows({"size_bytes": facts["size_bytes"]}),
    ]


def _other_groups(parts: Facts) -> Iterator[Group]:
    for name, part in parts.items():
        if part:
            yield name.replace("_", " "), _other_rows(part)


def _other_rows(facts: Facts) -> Rows:
    return [row for key, value in facts.items() if value not in (None, [], {}) for row in _rows(key, value)]


def _rows(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """A fact's row; for a list of steps, such as a training history, one row per step."""
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        for number, part in enumerate(value, 1):
            yield key.replace("_", " ") if number == 1 else "", f"{number}  {_plain(part)}"
    else:
        yield _row(key, value)


def _row(key: str, value: Any) -> tuple[str, str]:
    """A fact as a label and text; its name may end in its unit."""
    for unit in ("_bytes", "_s"):
        if key.endswith(unit) and isinstance(value, int | float):
            text = size(value) if unit == "_bytes" else f"{value:.3f} s"
            return key.removesuffix(unit).replace("_", " "), text
    return key.replace("_", " "), _plain(value)


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ("; " if any(isinstance(part, dict) for part in value) else ", ").join(map(_plain, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
