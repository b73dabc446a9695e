import os
import time

import pytest

from ego2robot.decode.aside import Aside
from ego2robot.errors import VideoError


def work(name, what="fine"):
    if what == "crash":
        os.abort()
    if what == "hang":
        time.sleep(60)
    if what == "refuse":
        raise VideoError(name, "damaged", "fetch it again", "corrupt")
    print("talk")
    return os.getpid()


def test_a_call_that_crashes_or_hangs_costs_itself_and_the_next_one_is_answered(capfd):
    with Aside(work, 10.0) as aside:
        first = aside("a")
        assert first == aside("b") != os.getpid()
        for what, kind in (("refuse", "corrupt"), ("crash", "crash"), ("hang", "timeout")):
            if what == "hang":
                aside._timeout_s = 0.5
            with pytest.raises(VideoError) as caught:
                aside(f"{what}.vrs", what)
            assert caught.value.kind == kind and caught.value.name == f"{what}.vrs"
            aside._timeout_s = 30.0
            again = aside("c")
            assert (again == first) == (what == "refuse")
            first = again
    assert "talk" not in capfd.readouterr().out
