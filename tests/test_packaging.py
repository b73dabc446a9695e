"""The wheel works in an environment that has never seen the checkout."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.footage import write_video

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The command of an environment that holds our wheel and, by path, the packages it needs."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False)
    site = next((folder / "env").glob("lib/python*/site-packages"))
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True)
    # A folder in a .pth is added as it is: the editable install in it is not followed.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "env" / "bin" / "python", wheel


def run(python, *args, cwd):
    code = "from ego2robot.cli import main; main()"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [str(python), "-c", code, *args],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_the_wheel_holds_recipes_and_kernels_and_no_bare_top_level_names(installed):
    names = zipfile.ZipFile(installed[1]).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"ego2robot", "ego2robot_kernels"}
    assert {"ego2robot/configs/demo.yaml", "ego2robot_kernels/motion.py"} <= set(names)
    assert any(name.endswith(".j2") for name in names)
    checkout = {p.relative_to(ROOT).as_posix() for p in (ROOT / "ego2robot").rglob("*.py")}
    assert checkout <= set(names)


def test_a_recipe_is_found_by_name_and_its_first_stages_run(installed, tmp_path):
    python, _ = installed
    where = subprocess.run(
        [str(python), "-c", "import ego2robot, ego2robot_kernels; print(ego2robot.__file__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert str(ROOT) not in where
    assert "demo" in run(python, "recipes", cwd=tmp_path).stdout
    write_video(tmp_path / "a.mp4", n_frames=200)
    done = run(
        python,
        "run",
        "demo",
        f"source.path={tmp_path / 'a.mp4'}",
        "run_dir=r",
        "hands.detector=none",
        "export.enabled=false",
        "gate.min_motion=0",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r" / "report.html").is_file()
    checked = run(python, "verify", "r", cwd=tmp_path)
    assert checked.returncode == 0 and "2 clips planned = 2 kept" in checked.stdout, checked.stdout
