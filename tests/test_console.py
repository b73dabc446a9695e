import pytest
import torch

from ego2robot import cli
from ego2robot.console import duration, funnel_text, line
from ego2robot.errors import UserError
from ego2robot.progress import Progress
from ego2robot.report import Funnel


def test_the_line_has_count_eta_and_rates():
    said = line(Progress("curating", 120, 480, 34, 3.2, 96.0, 112.4))
    assert said == "curating 120/480 clips · ETA 1:52 · 3.20 clips/s · 96.0 video-h/h · 34 kept"


def test_a_finished_or_unmeasured_line_claims_no_eta():
    assert "ETA" not in line(Progress("curating", 480, 480, 34, 3.2, 96.0, 0.0))
    assert line(Progress("curating", 0, 480)) == "curating 0/480 clips · 0 kept"
    assert line(Progress("exporting", 3, 50)) == "exporting 3/50"


def test_durations_read_like_a_clock():
    assert [duration(s) for s in (0, 59.6, 61, 3725)] == ["0:00", "1:00", "1:01", "1:02:05"]


def test_the_funnel_adds_up_in_print():
    said = funnel_text(Funnel(100, 60, {"motion below 0.1": 30}, {"corrupt frames": 4}))
    counts = [int(row.split("%")[0].split()[-2]) for row in said.splitlines()]
    assert counts == [100, 90, 30, 4, 60, 6] and "corrupt frames" in said


def test_an_empty_run_has_a_funnel_too():
    assert "planned" in funnel_text(Funnel(0, 0, {}, {}))


def test_gpus_are_all_or_a_number_and_must_be_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [cli._gpus(asked) for asked in (None, "all", "3")] == [[], ["gpus=0"], ["gpus=3"]]
    for wrong in ("0", "-1", "two", ""):
        with pytest.raises(UserError, match="give `all` or a number"):
            cli._gpus(wrong)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no GPU"):
        cli._gpus("all")
