# SPDX-License-Identifier: Apache-2.0
"""What is built and installed: the wheel of ``make test``, the wheel without a compiler, the tree.

Wheels go into virtual environments of their own that see this environment's packages behind their
own, so that torch need not be installed again; processes run away from the checkout.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import fastpref

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).resolve().parents[1]

SCORE = """
import sys, torch, fastpref
from fastpref import ScoringOptions, _extension
assert fastpref.__file__.startswith(sys.argv[1]), fastpref.__file__
torch.manual_seed(0)
hidden, weight = torch.randn(40, 16), torch.randn(300, 16, requires_grad=True)
target = torch.randint(300, (40,))
options = ScoringOptions(backend=sys.argv[2])
got = fastpref.linear_logprob(hidden, weight, target, options=options).logp
want = (hidden @ weight.T).log_softmax(-1).gather(1, target[:, None])[:, 0]
torch.testing.assert_close(got, want)
grads = [torch.autograd.grad(logp.sum(), weight)[0] for logp in (got, want)]
torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
print(_extension.ops_unavailable_reason(), _extension.native_module_unavailable_reason())
"""


def environment(**values: str) -> dict[str, str]:
    """This process's, without the path on which pip would find the checkout installed already."""
    return {name: os.environ[name] for name in os.environ if name != "PYTHONPATH"} | values


def install(wheel: Path, directory: Path) -> tuple[Path, Path]:
    """Install into a new environment. Returns its Python and its site-packages."""
    venv.create(directory, symlinks=os.name != "nt")
    paths = sysconfig.get_paths(vars={"base": str(directory), "platbase": str(directory)})
    python, site = Path(paths["scripts"], "python"), Path(paths["purelib"])
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    command += ["install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(command, check=True, cwd=directory, env=environment())
    # A path file there makes no path file of those directories count: no checkout comes along.
    outer = {sysconfig.get_path("purelib"), str(Path(torch.__file__).parents[1])}
    (site / "outer.pth").write_text("\n".join(sorted(outer)) + "\n")
    return python, site


def score(wheel: Path, directory: Path, backend: str) -> subprocess.CompletedProcess[str]:
    python, site = install(wheel, directory / "venv")
    command = [str(python), "-c", SCORE, str(site), backend]
    return subprocess.run(command, cwd=directory, env=environment(), capture_output=True, text=True)


@pytest.fixture(scope="module")
def built_wheel() -> Path:
    name = os.environ.get("FASTPREF_WHEEL")
    if not name:
        pytest.skip("FASTPREF_WHEEL names no wheel; `make test` builds one and sets it")
    return Path(name).resolve()


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that a build reads, without what earlier builds left."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("not run from a checkout")
    tree = tmp_path_factory.mktemp("source") / "fastpref"
    left_over = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
    for name in ("fastpref", "csrc", "kernels"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=left_over)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree / name)
    return tree


def build(tree: Path, target: Path, **values: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "-w"]
    command += [str(target), "--no-build-isolation", "--no-deps", "--no-index", str(tree)]
    return subprocess.run(command, env=environment(**values), capture_output=True, text=True)


def test_wheel_scores_away_from_the_checkout(built_wheel: Path, tmp_path: Path) -> None:
    if built_wheel.name.endswith("-none-any.whl"):
        pytest.skip("built without a compiler")
    done = score(built_wheel, tmp_path, "cpp")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["None", "None"]
    assert "Warning" not in done.stderr


def test_wheel_holds_every_module_and_nothing_beside_the_package(built_wheel: Path) -> None:
    names = set(zipfile.ZipFile(built_wheel).namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    assert [name for name in inside if not name.startswith("fastpref/")] == []
    # Path.rglob does not follow fastpref/kernels.
    modules = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("fastpref/**/*.py")}
    modules |= {f"fastpref/{path.relative_to(ROOT)}" for path in ROOT.glob("kernels/**/*.py")}
    assert {name for name in inside if name.endswith(".py")} == modules
    assert {"fastpref/py.typed", "fastpref/_build_info.json"} <= inside
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_is_small(built_wheel: Path) -> None:
    """0.94 MB, of them 0.69 of Python, 0.25 of libraries without symbols."""
    facts = json.loads(zipfile.ZipFile(built_wheel).read("fastpref/_build_info.json"))
    if not facts.get("cuda", "not built").startswith("not built"):
        pytest.skip("with code for GPUs, for as many architectures as were asked for")
    assert built_wheel.stat().st_size < 0.95e6


def test_wheel_declares_ranges_and_not_the_build_pin(built_wheel: Path) -> None:
    archive = zipfile.ZipFile(built_wheel)
    metadata = next(name for name in archive.namelist() if name.endswith("/METADATA"))
    lines = archive.read(metadata).decode().splitlines()
    needs = [line.removeprefix("Requires-Dist: ") for line in lines if "Requires-Dist" in line]
    assert [line for line in needs if "extra ==" not in line] == ["torch>=2.10"]
    assert f"Version: {fastpref.__version__}" in lines
    assert "Requires-Python: >=3.10" in lines


@pytest.mark.slow
def test_without_the_compiled_library_the_wheel_is_pure_and_works(
    source_tree: Path, tmp_path: Path
) -> None:
    done = build(source_tree, tmp_path, FASTPREF_SKIP_EXT="1", FASTPREF_FORCE_EXT="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    done = score(wheel, tmp_path, "auto")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("left out at build time by FASTPREF_SKIP_EXT No module")
    assert done.stderr.count("RuntimeWarning: fastpref runs on the CPU without its compiled") == 1
    # Not before something runs.
    python = tmp_path / "venv" / "bin" / "python"
    for code in ("import torch", "import torch, fastpref"):
        done = subprocess.run([python, "-c", code], capture_output=True, env=environment())
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b""), code


WITHOUT = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {!r} else find_spec(name, *rest)
"""


def set_up(
    tree: Path, command: str, without: tuple[str, ...], folder: Path, **values: str
) -> subprocess.CompletedProcess[str]:
    """One command of setup.py where some packages are not installed."""
    (folder / "sitecustomize.py").write_text(WITHOUT.format(without))
    run = [sys.executable, "setup.py", "-q", *command.split()]
    values = {"PYTHONPATH": str(folder), "FASTPREF_SKIP_EXT": "", "FASTPREF_FORCE_EXT": ""} | values
    return subprocess.run(run, cwd=tree, env=environment(**values), capture_output=True, text=True)


@pytest.mark.parametrize(
    ("without", "line"),
    [
        (("ninja",), "python -m pip install ninja\n"),
        (("pybind11",), "python -m pip install 'pybind11>=2.13'\n"),
        (("torch", "ninja"), "python -m pip install 'torch>=2.10' ninja\n"),
    ],
)
def test_a_compiler_without_the_rest_fails_with_the_line_that_mends_it(
    source_tree: Path, tmp_path: Path, without: tuple[str, ...], line: str
) -> None:
    built = tmp_path / "built"
    done = set_up(source_tree, f"build_ext --build-lib {built}", without, tmp_path)
    assert done.returncode != 0
    assert line in done.stderr and "FASTPREF_SKIP_EXT=1" in done.stderr
    assert "Traceback" not in done.stderr and not built.exists()
    # What compiles nothing does without.
    assert set_up(source_tree, f"egg_info -e {tmp_path}", without, tmp_path).returncode == 0
    # And so does a build that is told to leave the libraries out, or has no compiler.
    for values in ({"FASTPREF_SKIP_EXT": "1"}, {"CXX": "no-such-compiler"}):
        done = set_up(source_tree, f"build --build-base {built}", without, tmp_path, **values)
        assert done.returncode == 0, done.stderr
        assert "building without compiled libraries" in done.stderr


@pytest.mark.parametrize("address", [None, "https://host/owner/fastpref"])
def test_links_of_the_long_description_are_absolute(
    source_tree: Path, tmp_path: Path, address: str | None
) -> None:
    """A package index has no files for those of README.md to lead to."""
    tree = shutil.copytree(source_tree, tmp_path / "tree", symlinks=True)
    if address is not None:
        project = (tree / "pyproject.toml").read_text(encoding="utf-8")
        project = re.sub(r"# (\[project\.urls\])\n# (Repository) = .*", r"\1\n\2 = ", project)
        project = project.replace("\nRepository = ", f'\nRepository = "{address}"')
        (tree / "pyproject.toml").write_text(project, encoding="utf-8")
    done = set_up(tree, f"egg_info -e {tmp_path}", (), tmp_path)
    assert done.returncode == 0, done.stderr
    (facts,) = tmp_path.glob("*.egg-info/PKG-INFO")
    said = facts.read_text(encoding="utf-8")
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", said)
    assert [target for _, target in links if not re.match("https?:|#", target)] == []
    if address is None:
        assert "![" not in said and "not the fastest: benchmarks." in said
    else:
        assert f"[benchmarks]({address}/blob/main/benchmarks/README.md)" in said
        pictures = [target for mark, target in links if mark]
        assert pictures and all(one.startswith(f"{address}/raw/main/") for one in pictures)


def test_cuda_sources_are_compiled_where_they_are_asked_for(
    source_tree: Path, tmp_path: Path
) -> None:
    """An nvcc that is found does not make a first installation take minutes."""
    (tmp_path / "nvcc").write_text("#!/bin/sh\necho nvcc ran >&2\nexit 1\n")
    (tmp_path / "nvcc").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    said = {}
    for choice in (None, "1"):
        env = environment(PATH=path, FASTPREF_SKIP_EXT="1", FASTPREF_BUILD_CUDA=choice or "")
        for name in ("CUDA_HOME", "CUDA_PATH", *(() if choice else ("FASTPREF_BUILD_CUDA",))):
            env.pop(name, None)
        command = [sys.executable, "-c", PLANNING.format(root=str(source_tree))]
        said[choice] = subprocess.run(command, env=env, capture_output=True, text=True).stdout
    assert "left out, as FASTPREF_BUILD_CUDA=1 was not set" in said[None]
    assert "nvcc ran" in said["1"]


PLANNING = """
import sys
sys.path.insert(0, {root!r})
import setuptools
setuptools.setup = lambda **given: None
import setup
try:
    print(setup.find_nvcc())
except setup.Unavailable as reason:
    print(reason)
"""


def test_an_editable_install_works_beside_the_checkout(source_tree: Path, tmp_path: Path) -> None:
    """A folder called fastpref in the working directory is no package of that name."""
    checkout = shutil.copytree(source_tree, tmp_path / "fastpref", symlinks=True)
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    paths = sysconfig.get_paths(vars={"base": str(tmp_path / "venv")})
    outer = {sysconfig.get_path("purelib"), str(Path(torch.__file__).parents[1])}
    Path(paths["purelib"], "outer.pth").write_text("\n".join(sorted(outer)) + "\n")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    command += ["install", "-q", "--no-build-isolation", "--no-deps", "--no-index", "-e"]
    env = environment(FASTPREF_SKIP_EXT="1")
    subprocess.run([*command, str(checkout)], check=True, cwd=tmp_path, env=env)
    code = "import fastpref, fastpref.kernels; print(fastpref.__file__, fastpref.sequence_logp)"
    done = subprocess.run(
        [python, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(checkout / "fastpref" / "__init__.py"))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"CXX": "no-such-compiler"}, "no working C\\+\\+17 compiler at build time"),
        ({"FASTPREF_SKIP_EXT": "1"}, "left out at build time by FASTPREF_SKIP_EXT"),
    ],
)
def test_forcing_the_compiled_library_fails_with_the_reason(
    source_tree: Path, tmp_path: Path, values: dict[str, str], said: str
) -> None:
    done = build(source_tree, tmp_path, FASTPREF_FORCE_EXT="1", **values)
    assert done.returncode != 0
    assert re.search(f"FASTPREF_FORCE_EXT cannot be followed: {said}", done.stdout + done.stderr)
    assert list(tmp_path.glob("*.whl")) == []


def test_version_is_a_literal_that_builds_read_without_importing() -> None:
    tree = ast.parse((ROOT / "fastpref" / "__init__.py").read_text())
    values = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and [ast.unparse(target) for target in node.targets] == ["__version__"]
    ]
    assert [ast.literal_eval(value) for value in values] == [fastpref.__version__]


def test_build_and_development_use_the_same_torch() -> None:
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    (pin,) = (line for line in constraints if line.startswith("torch=="))
    assert f'"{pin}"' in (ROOT / "pyproject.toml").read_text()


def test_constraints_pin_every_line_once_for_a_python() -> None:
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    pattern = r'[\w.-]+==[\w.]+( ; (python_version (<|>=) "3.11"|sys_platform == "linux"))?'
    assert [line for line in lines if not re.fullmatch(pattern, line)] == []
    keys = [re.sub("==[^ ]+", "", line) for line in lines]
    assert len(keys) == len(set(keys))


@pytest.mark.skipif(not (ROOT / "kernels").exists(), reason="a source archive holds it elsewhere")
def test_kernels_directory_does_not_shadow_a_package_of_that_name() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "fastpref" / "kernels").resolve() == ROOT / "kernels"


def test_importing_loads_no_compiler_and_no_trainer() -> None:
    """Each takes a second or more, of every command and every worker process."""
    heavy = (
        "torch._dynamo",
        "torch.distributed.tensor",
        "triton",
        "transformers",
        "trl",
        "matplotlib",
    )
    code = f"import sys, fastpref; print([one for one in {heavy!r} if one in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
