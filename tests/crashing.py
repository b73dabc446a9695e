"""Stands in for a decoder that ends its process: the real scoring work, but some videos kill it."""

import os
import signal

from ego2robot.jobs.worker import scoring as real_scoring


def scoring(work):
    score = real_scoring(work)

    def crash_on_some(unit):
        for i, scored in enumerate(score(unit)):
            if "crash" in unit.video.name and i == 1:
                os.kill(os.getpid(), signal.SIGSEGV)
            yield scored

    return crash_on_some
