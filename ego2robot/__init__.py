"""ego2robot turns first-person work video into robot-learning datasets."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "iter_trajectories"]


def __getattr__(name: str) -> Any:
    if name == "iter_trajectories":  # what it needs takes long to import
        from ego2robot.trajectories import iter_trajectories

        return iter_trajectories
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
