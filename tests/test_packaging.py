"""What a wheel and an sdist hold, and what an installed package offers."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKED = {"mstc": "mstc", "passes": "mstc/passes", "kernels": "mstc/kernels"}


def expected_files() -> set[str]:
    """Every source file, where a wheel must have it."""
    found = set()
    for folder, place in LINKED.items():
        for path in (ROOT / folder).rglob("*"):
            linked = any(parent.is_symlink() for parent in path.parents)
            if path.is_file() and "__pycache__" not in path.parts and not linked:
                found.add(f"{place}/{path.relative_to(ROOT / folder).as_posix()}")
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist and wheels built from the tree (``tree``) and from that sdist (``sdist``)."""
    out = tmp_path_factory.mktemp("built")
    source = out / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in LINKED:
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    _build(source, "build_sdist", out)
    _build(source, "build_wheel", out / "tree")
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        archive.extractall(out / "unpacked", filter="data")
    _build(next((out / "unpacked").iterdir()), "build_wheel", out / "sdist")
    return out


def _build(source: Path, hook: str, out: Path) -> None:
    out.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; build_meta.{hook}({str(out)!r})"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("origin", ["tree", "sdist"])
def test_wheel_holds_every_source_file_and_nothing_else(built: Path, origin: str) -> None:
    with zipfile.ZipFile(next((built / origin).glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == expected_files()
    assert {"mstc/passes/__init__.py", "mstc/py.typed"} <= names
    assert not [name for name in names if not name.startswith("mstc/")]


def test_wheel_declares_its_entry_points_and_licence(built: Path) -> None:
    with zipfile.ZipFile(next((built / "tree").glob("*.whl"))) as wheel:
        info = {name.split(".dist-info/")[1]: name for name in wheel.namelist() if ".dist-info/" in name}
        entries = wheel.read(info["entry_points.txt"]).decode()
        metadata = wheel.read(info["METADATA"]).decode()
    assert "[torch_dynamo_backends]\nmstc = mstc.backend:mstc" in entries
    assert "mstc = mstc.cli.main:main" in entries
    assert "licenses/LICENSE" in info
    assert "Requires-Python: >=3.11" in metadata


def test_sdist_holds_what_a_build_needs(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"pyproject.toml", "README.md", "LICENSE"} | expected_files() <= names


def test_the_installed_package_is_a_backend() -> None:
    (entry,) = entry_points(group="torch_dynamo_backends", name="mstc")
    assert entry.value == "mstc.backend:mstc"


def _python(code: str, *, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


def test_importing_mstc_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import mstc, sys; mstc.OptionError, mstc.reports; assert not {'torch', 'triton', 'click'} & set(sys.modules)"
    )
    done = _python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_public_names() -> None:
    import mstc

    for name in mstc.__all__:
        assert getattr(mstc, name) is not None and name in dir(mstc)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mstc.nothing


def test_a_bare_import_of_passes_is_refused() -> None:
    done = _python("import passes", cwd=ROOT)
    assert done.returncode != 0 and "import mstc.passes" in done.stderr


def test_the_folder_kernels_hides_no_other_package() -> None:
    code = "import importlib.util as u; s = u.find_spec('kernels'); assert s is None or s.origin is None, s"
    done = _python(code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
