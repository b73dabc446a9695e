"""ego2robot turns first-person work video into robot-learning datasets."""

__version__ = "0.1.0"
