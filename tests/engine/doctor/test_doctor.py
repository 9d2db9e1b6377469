"""An examination has a finding for every check, whatever that raises, prints or warns of."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from flowreel.engine.doctor import CHECKS, Check, Diagnosis, Finding, examine
from tests.engine.doctor.looking import raising


def test_this_machine_can_run_on_its_cpu() -> None:
    diagnosis = examine()
    assert diagnosis.wanting("cpu") == []
    facts = diagnosis.as_json()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["cpu_ok"] is True
    for checked, finding in diagnosis.found:
        assert finding.status == "ok" or finding.advice or checked.demand == "extra", checked.name
        assert "\n" not in finding.detail + finding.advice
    assert len({checked.name for checked in CHECKS}) == len(CHECKS)


def test_nothing_heavy_is_imported_before_its_own_check() -> None:
    code = "import sys, flowreel.engine.doctor; print([m for m in ('torch', 'av', 'zarr', 'cupy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class TestExamining:
    def one(self, look: Callable[[], Finding], capsys: pytest.CaptureFixture[str]) -> Finding:
        ((_, finding),) = examine([Check("it", "cpu", "a test", look, "mend it")]).found
        assert capsys.readouterr() == ("", "")
        return finding

    @pytest.mark.parametrize(
        ("error", "status", "detail"),
        [
            (ModuleNotFoundError("No module named 'cupy'", name="cupy"), "missing", "cupy is not installed"),
            (ModuleNotFoundError("its own words"), "missing", "its own words is not installed"),
            (ImportError("\nundefined symbol: x\nand more"), "broken", "ImportError: undefined symbol: x"),
            (ValueError(), "broken", "ValueError"),
        ],
    )
    def test_what_a_check_raises_is_its_finding(
        self, error: Exception, status: str, detail: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.one(raising(error), capsys) == Finding(status, "", detail, "mend it")  # type: ignore[arg-type]

    def test_what_a_check_prints_and_warns_of_stays_inside(self, capsys: pytest.CaptureFixture[str]) -> None:
        def loud() -> Finding:
            print("=== TROUBLESHOOTING ===")
            print("Error!", file=sys.stderr)
            warnings.warn("old", UserWarning, stacklevel=1)
            return Finding("ok", "1.0")

        assert self.one(loud, capsys) == Finding("ok", "1.0")

    def test_own_advice_wins(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.one(lambda: Finding("missing", advice="do this"), capsys).advice == "do this"

    def test_ctrl_c_gets_through(self) -> None:
        with pytest.raises(KeyboardInterrupt):
            examine([Check("it", "cpu", "a test", raising(KeyboardInterrupt()), "")])  # type: ignore[arg-type]

    def test_what_is_wanting(self) -> None:
        def of(demand: Any, status: Any) -> tuple[Check, Finding]:
            return Check(f"{demand} {status}", demand, "", lambda: Finding(status), ""), Finding(status)

        diagnosis = Diagnosis((of("cpu", "ok"), of("gpu", "missing"), of("gpu", "ok"), of("extra", "missing")))
        assert diagnosis.wanting("cpu") == []
        assert diagnosis.wanting("cpu", "gpu") == ["gpu missing"]
        facts = diagnosis.as_json()
        assert (facts["cpu_ok"], facts["gpu_ok"]) == (True, False)
        assert Diagnosis((of("cpu", "broken"),)).as_json()["gpu_ok"] is False
