"""The wheel holds everything, and works in a fresh environment outside the tree."""

import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
ROOTS = {
    "acmil": "acmil",
    "acmil.configs": "configs",
    "acmil.kernels": "kernels",
    "acmil.preprocessing": "preprocessing",
}
IMPORT_EVERYTHING = """
import importlib, pkgutil, acmil
names = [m.name for m in pkgutil.walk_packages(acmil.__path__, "acmil.") if m.name != "acmil.__main__"]
for name in names:
    importlib.import_module(name)
print(acmil.__file__)
print("\\n".join(names))
"""


def packages_in_the_tree() -> dict[str, Path]:
    found = {}
    for name, folder in ROOTS.items():
        for init in (REPOSITORY / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(REPOSITORY / folder).parts
            found[".".join((name, *parts))] = init.parent
    return found


def test_every_package_is_listed():
    listed = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(packages_in_the_tree())


def test_every_folder_of_modules_is_a_package():
    folders = {path.parent for root in ROOTS.values() for path in (REPOSITORY / root).rglob("*.py")}
    assert folders == set(packages_in_the_tree().values())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy, so that the build leaves nothing in the tree
    names = subprocess.run(
        ["git", "-C", str(REPOSITORY), "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in names:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((REPOSITORY / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(command, capture_output=True, check=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_module_preset_and_template(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    expected = {"acmil/py.typed", "acmil/templates/demo.html"}
    for name, folder in packages_in_the_tree().items():
        expected |= {f"{name.replace('.', '/')}/{path.name}" for path in folder.glob("*.py")}
    expected |= {
        f"acmil/configs/{path.relative_to(REPOSITORY / 'configs').as_posix()}"
        for path in (REPOSITORY / "configs").rglob("*.yaml")
    }
    assert held >= expected, sorted(expected - held)


def test_the_wheel_works_in_a_fresh_environment_outside_the_tree(wheel, tmp_path):
    """The environment is fresh; only the dependencies are lent to it, from the one that runs the tests."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True, symlinks=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    question = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(question, capture_output=True, text=True, check=True).stdout.strip())
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shown = subprocess.run(
        [python, "-W", "ignore", "-c", IMPORT_EVERYTHING], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr
    location, *modules = shown.stdout.splitlines()
    assert Path(location).is_relative_to(site)
    assert {"acmil.kernels", "acmil.preprocessing.slide", "acmil.training", "acmil.demo.pipeline"} <= set(modules)
    help_text = subprocess.run(
        [environment / "bin" / "acmil", "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert "heatmap" in help_text


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_two_commands_install_once(tmp_path, target):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((REPOSITORY / name).read_bytes())

    def planned() -> str:
        return subprocess.run(["make", "-n", target], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    first = planned()
    assert "-m venv .venv" in first
    assert "--constraint constraints.txt --editable" in first
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed").touch()
    assert "pip" not in planned()
    assert {"demo": "acmil demo --out demo", "test": "-m pytest"}[target] in planned()


def test_ci_calls_lint_and_test():
    lines = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert lines[-2:] == ["make lint", "make test"]
