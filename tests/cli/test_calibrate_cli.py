from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from cli.screen import tells


def test_it_starts_its_own_ranks(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    code, out, err = run("calibrate")
    assert (code, out) == (2, "")
    assert "no torchrun" in err


@pytest.mark.parametrize("took_s", [9.0, 31.0])
def test_time_that_did_not_suffice_is_told(monkeypatch, capsys, took_s):
    from expertlane.cli import calibrate

    fake = SimpleNamespace(run=lambda progress: None, took_s=took_s, profile=lambda name: name)
    monkeypatch.setattr("expertlane.engine.launch.start_pool", lambda *_, **__: nullcontext())
    monkeypatch.setattr("expertlane.calibrate.run.Calibration", lambda *_, **__: fake)
    monkeypatch.setattr(calibrate.output, "progress_on_stderr", nullcontext)
    options = SimpleNamespace(
        name="mine", ranks=1, within=10.0, timeout_s=60.0, dtype=None, cpu_isa=None
    )
    assert calibrate._measure(options) == (fake, "mine")
    err = capsys.readouterr().err
    assert tells(err, "31 s --within 10") if took_s > 10 else err == ""
