"""What is installed where there is no checkout: everything, from the source distribution to a wheel that trains."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sb3_ppo_from_scratch

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "CFLAGS": "-O0 -g0"}

_EVERYTHING = """
import importlib, pkgutil
import sb3_ppo_from_scratch as package
from sb3_ppo_from_scratch import ScratchPPO, zoo
names = [each.name for each in pkgutil.walk_packages(package.__path__, "sb3_ppo_from_scratch.")]
for name in names:
    if name.rpartition(".")[2] not in ("__main__", "_kernel"):  # a program, and a library that is no module
        importlib.import_module(name)
assert zoo.hyperparams_file().is_file()
ScratchPPO("MlpPolicy", "CartPole-v1", n_steps=64).learn(64)
print(package.__file__, zoo.hyperparams_file(), len(names))
"""


def run(*command: object, cwd: Path, path: Path | None = None) -> str:
    environment = ENVIRONMENT if path is None else {**ENVIRONMENT, "PYTHONPATH": str(path)}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_of_the_source_distribution_holds_everything(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", "70.1")
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "build", "runs", "tests", "benchmarks", "docs", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", tmp_path, cwd=source)
    (packed,) = tmp_path.glob("*.tar.gz")
    shutil.rmtree(source)
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", tmp_path)
    run(sys.executable, "-m", "pip", "wheel", *options, packed, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name}
        opened.extractall(installed)

    package = ROOT / "sb3_ppo_from_scratch"
    expected = {str(path.relative_to(ROOT)) for path in package.rglob("*.py")} | {"sb3_ppo_from_scratch/py.typed"}
    expected |= {f"sb3_ppo_from_scratch/hyperparams/{path.name}" for path in (ROOT / "hyperparams").glob("*.yml")}
    library = "sb3_ppo_from_scratch/engines/compiled/_kernel.so"
    assert names - {library} == expected
    assert (library in names) == (shutil.which("cc") is not None)
    assert f"-{sb3_ppo_from_scratch.__version__}-py3-none-" in wheel.name

    module, file, n_modules = run(sys.executable, "-c", _EVERYTHING, cwd=tmp_path, path=installed).split()[-3:]
    assert module.startswith(str(installed))
    assert file.startswith(str(installed))
    assert int(n_modules) > 70
