"""The wheel built from this tree is what a user installs: whole, without tests, enough to run the README's Python."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from tests.test_docs import python_of

ROOT = Path(__file__).parents[1]
SITE = Path(pytest.__file__).parents[1]  # where the heavy dependencies are installed


def run(*command: str | Path, cwd: Path) -> str:
    """Output of a command that sees nothing of this tree; the test fails with what it printed if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    return folder / run(sys.executable, "-c", build, folder, cwd=ROOT).split()[-1]


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    source = ROOT / "src"
    expected = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }
    assert {"opencloc/py.typed", "opencloc/pretrained/tiny/model.safetensors"} <= expected
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected


@pytest.mark.slow
def test_the_wheel_runs_the_python_of_the_readme_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """The environment has opencloc from the wheel alone; its dependencies are lent by a path file."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    zipfile.ZipFile(wheel).extractall(site)
    # a path, not a site folder: path files in it, such as that of an editable opencloc, are not followed
    (site / "dependencies.pth").write_text(f"{SITE}\n")
    where = run(python, "-c", "import opencloc; print(opencloc.__file__, opencloc.__version__)", cwd=tmp_path).split()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert where == [str(site / "opencloc" / "__init__.py"), version]
    run(python, "-c", "\n".join(python_of(ROOT / "README.md")), cwd=tmp_path)


def test_the_citation_names_the_version_of_the_package() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_hooks_and_ci_use_the_same_ruff() -> None:
    hook = re.search(r"ruff-pre-commit\n\s+rev: v([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    pinned = re.search(r"^ruff==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert hook is not None
    assert pinned is not None
    assert hook[1] == pinned[1]
