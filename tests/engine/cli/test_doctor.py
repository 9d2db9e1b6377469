"""``flowreel doctor`` for a user and for a script."""

from __future__ import annotations

import json

import pytest
import typer

from flowreel.engine import doctor as examining
from flowreel.engine.cli.doctor import doctor
from flowreel.engine.doctor import Check, Finding

Capture = pytest.CaptureFixture[str]


def checks(**states: str) -> tuple[Check, ...]:
    """One check for each demand, with the given status."""
    made = []
    for demand, status in states.items():
        finding = Finding(status, "1.2", f"the {demand} part")  # type: ignore[arg-type]
        made.append(Check(f"{demand} thing", demand, "a run", lambda f=finding: f, "turn it on"))  # type: ignore
    return tuple(made)


def code(**options: bool) -> int:
    try:
        doctor(**options)
    except typer.Exit as leaving:
        return leaving.exit_code
    return 0


@pytest.mark.parametrize(
    ("cpu", "gpu", "plain", "strict"),
    [("ok", "ok", 0, 0), ("ok", "missing", 0, 1), ("ok", "broken", 0, 1), ("missing", "ok", 1, 1)],
)
def test_exit_codes(
    cpu: str, gpu: str, plain: int, strict: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(examining, "CHECKS", checks(cpu=cpu, gpu=gpu, extra="missing"))
    assert code() == plain
    assert code(gpu=True) == strict
    assert code(as_json=True) == plain


def test_lines_and_advice(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(examining, "CHECKS", checks(cpu="ok", gpu="missing"))
    code()
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "ok       cpu thing  1.2, the cpu part",
        "missing  gpu thing  1.2, the gpu part",
        "                    for a run: turn it on",
        "a run on the CPU has all it needs",
        "a run on a GPU lacks gpu thing",
    ]
    assert err == ""


def test_what_was_found_is_on_one_line_without_terminal_codes(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    finding = Finding("missing", detail="in \x1b[31m\nred" + "/a folder" * 10, advice="leave \x1b[31m")
    monkeypatch.setattr(examining, "CHECKS", (Check("folder", "cpu", "outputs", lambda: finding, ""),))
    code()
    assert capsys.readouterr().out.splitlines() == [
        r"missing  folder  in \x1b[31m\nred" + "/a folder" * 10,
        r"                 for outputs: leave \x1b[31m",
        "a run on the CPU lacks folder",
        "a run on a GPU lacks folder",
    ]


def test_json(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(examining, "CHECKS", checks(cpu="ok", gpu="broken"))
    code(as_json=True)
    facts = json.loads(capsys.readouterr().out)
    assert (facts["cpu_ok"], facts["gpu_ok"]) == (True, False)
    assert facts["checks"][1] == {
        "name": "gpu thing",
        "demand": "gpu",
        "needed_for": "a run",
        "status": "broken",
        "version": "1.2",
        "detail": "the gpu part",
        "advice": "turn it on",
    }
