"""Where videos come from."""

from ego2robot.sources.aria import Aria
from ego2robot.sources.base import Candidate, Source
from ego2robot.sources.ego4d import Ego4D
from ego2robot.sources.egocentric10k import Egocentric10K
from ego2robot.sources.egodex import EgoDex
from ego2robot.sources.epic_kitchens import EpicKitchens
from ego2robot.sources.folder import Folder
from ego2robot.sources.hot3d import HOT3D
from ego2robot.sources.lerobot import LeRobot
from ego2robot.sources.manifest import Manifest

SOURCES: dict[str, Source] = {
    "folder": Folder(),
    "egocentric10k": Egocentric10K(),
    "egodex": EgoDex(),
    "epic_kitchens": EpicKitchens(),
    "ego4d": Ego4D(),
    "hot3d": HOT3D(),
    "aria": Aria(),
    "lerobot": LeRobot(),
    "manifest": Manifest(),
}

__all__ = ["SOURCES", "Candidate", "Source"]
