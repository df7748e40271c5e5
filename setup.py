# SPDX-License-Identifier: Apache-2.0
"""Build the two compiled libraries of fastpref, or record why they were not built.

``fastpref/_ops.so`` holds the tensor operators. It uses torch's stable ABI and no Python symbol, so
it is no extension module: one file serves every CPython and every torch from 2.10 on.
``fastpref/_C`` is a small pybind11 module. Both go to ninja directly, because neither wants the
flags that Python was compiled with. What was built, with what, and why something was not, is
written to ``fastpref/_build_info.json``.

Without a compiler the package is pure Python. With one, but without what a build takes beside it
(``--no-build-isolation``), the build fails and says what to install.

Environment: FASTPREF_SKIP_EXT, FASTPREF_FORCE_EXT, FASTPREF_BUILD_CUDA (0, auto or 1),
TORCH_CUDA_ARCH_LIST, CUDA_HOME, CXX, CXXFLAGS, LDFLAGS, MAX_JOBS.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
LEAST_TORCH = (2, 10)
STABLE_ABI = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
SHARED = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-g0", "-Wall"]
# Of the row kernels, whose loops all ask to be vectorised: -O3 made them larger by a half, and no
# faster.
KERNELS = ["-O2", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", *SHARED]
# What the operators around them and the module do takes no time: small, the module without
# pybind11's checks of itself.
SMALL = ["-Os", *SHARED]
MODULE = ["-DNDEBUG", *SMALL]
WHOLE = ["-flto=auto"]  # smaller still
NVCC = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
# Machine code for Ampere (and Ada), Hopper and Blackwell; PTX of the newest for what comes after.
CUDA_ARCHITECTURES = ("8.0", "9.0a", "10.0")
# By the name of its module what a build takes beside setuptools; an isolated one has it.
BUILD_PACKAGES = {"torch": "torch>=2.10", "ninja": "ninja", "pybind11": "pybind11>=2.13"}


class Unavailable(Exception):
    """A library cannot be built here; the message is the reason that users are shown."""


class Missing(Unavailable):
    """One could be, but for Python packages that are not there."""


def flag(name: str) -> bool:
    return os.environ.get(name, "").lower() not in ("", "0", "false", "off", "no")


def words(name: str) -> list[str]:
    return shlex.split(os.environ.get(name, ""))


def output_of(command: list[str]) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()


def compiler() -> list[str]:
    return words("CXX") or [shutil.which("g++") or shutil.which("c++") or "c++"]


def complaint(command: list[str], source: str, suffix: str) -> str | None:
    """None when ``command`` makes a shared library of ``source``, else the first line it said."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "probe" + suffix)
        path.write_text(source)
        target = str(path.with_suffix(".so"))
        try:
            done = subprocess.run(
                [*command, "-shared", "-o", target, str(path)], capture_output=True, text=True
            )
        except OSError as error:
            return str(error)
    if done.returncode == 0:
        return None
    return next(iter((done.stderr or done.stdout).splitlines()), f"exit {done.returncode}")


def torch_directory() -> Path:
    """Where torch is installed, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise Missing("torch is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def missing_packages() -> list[str]:
    """What a build takes and is not installed, as pip is asked for it."""
    missing = [
        requirement
        for name, requirement in BUILD_PACKAGES.items()
        if importlib.util.find_spec(name) is None
    ]
    if "torch>=2.10" not in missing:
        version = importlib.metadata.version("torch")
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < LEAST_TORCH:
            missing.append("torch>=2.10")
    return missing


def require_ops() -> None:
    """Raise Unavailable unless the operators can be built here, Missing where packages would do."""
    if flag("FASTPREF_SKIP_EXT"):
        raise Unavailable("left out at build time by FASTPREF_SKIP_EXT")
    if not sys.platform.startswith(("linux", "darwin")):
        raise Unavailable(f"built on Linux and macOS only, not on {sys.platform}")
    said = complaint(
        [*compiler(), *KERNELS], "#include <optional>\nstd::optional<int> x;\n", ".cpp"
    )
    if said is not None:
        name = shlex.join(compiler())
        raise Unavailable(f"no working C++17 compiler at build time ({name}: {said})")
    missing = missing_packages()
    if missing:
        raise Missing(
            "there is a C++ compiler, but not all that a build without isolation takes. "
            f"Install it:\n\n    python -m pip install {shlex.join(missing)}\n\n"
            "and build again; or leave the compiled libraries out, which is slower on CPUs and no "
            "slower on GPUs, with FASTPREF_SKIP_EXT=1"
        )


def module_includes() -> list[str]:
    """Include directories of the pybind11 module. Raises Unavailable."""
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").exists():
        raise Unavailable("Python's C headers were not installed at build time")
    import pybind11

    return [str(include), pybind11.get_include()]


def cuda_sources() -> list[Path]:
    return sorted(CSRC.glob("cuda/*.cu"))


def find_nvcc() -> str:
    """A working nvcc. Raises Unavailable."""
    choice = os.environ.get("FASTPREF_BUILD_CUDA", "0")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"FASTPREF_BUILD_CUDA: got {choice!r}, expected auto, 0 or 1.")
    if choice == "0":
        raise Unavailable("left out, as FASTPREF_BUILD_CUDA=1 was not set at build time")
    if not cuda_sources():
        raise Unavailable("this version has no CUDA sources")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if shutil.which(nvcc) is None:
        raise Unavailable("no nvcc at build time")
    said = complaint([nvcc, *NVCC], "__global__ void probe() {}\n", ".cu")
    if said is not None:
        raise Unavailable(f"no working nvcc at build time ({said})")
    return nvcc


def cuda_architectures(nvcc: str) -> list[str]:
    """What to compile for, in the notation of TORCH_CUDA_ARCH_LIST. Raises Unavailable."""
    asked = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(";, "))
    if asked != [""]:
        return asked
    known = output_of([nvcc, "--list-gpu-arch"])
    names = [name for name in CUDA_ARCHITECTURES if "compute_" + re.sub(r"\D", "", name) in known]
    if not names:
        raise Unavailable(f"nvcc at build time knew none of {', '.join(CUDA_ARCHITECTURES)}")
    # PTX of an architecture with the suffix "a" runs nowhere else.
    return [*names, names[-1].rstrip("a") + "+PTX"]


def gencode(architectures: list[str]) -> list[str]:
    flags = []
    for name in architectures:
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", name)
        if match is None:
            expected = "names such as 8.0;9.0a;10.0+PTX"
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: got {name!r}, expected {expected}.")
        number = match[1] + match[2]
        for code in ("sm", "compute") if match[3] else ("sm",):
            flags.append(f"-gencode=arch=compute_{number},code={code}_{number}")
    return list(dict.fromkeys(flags))


def link_flags(libraries: list[str]) -> list[str]:
    if sys.platform == "darwin":
        first = ["-undefined", "dynamic_lookup", "-Wl,-x"]
    else:
        # No symbol of libtorch.so is used: it is kept because it brings in any libtorch_cuda.so.
        # libstdc++ goes before it, since some builds of torch export pieces of their own copy.
        # The table of symbols that nobody resolves stays out.
        first = ["-Wl,-s", "-Wl,--no-as-needed", "-lstdc++"]
    return [*first, *libraries, *words("LDFLAGS")]


def through_nvcc(word: str) -> str:
    """A flag of the host's linker as nvcc passes it on."""
    if word.startswith("-Wl,"):
        return "-Xlinker=" + word.removeprefix("-Wl,")
    return word if word.startswith(("-L", "-l")) else "-Xcompiler=" + word


class Ninja:
    """A ninja file: rules for C++, CUDA and linking, then one statement a file."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lines = ["rule link", "  command = $program -shared $in -o $out $flags"]
        for rule, dependencies in (("cxx", "-MMD -MF"), ("nvcc", "-MD -MF")):
            command = f"$program $flags {dependencies} $out.d -c $in -o $out"
            self.lines += [f"rule {rule}", f"  command = {command}"]
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def add(
        self, rule: str, output: str, inputs: list[str], program: list[str], flags: list[str]
    ) -> str:
        paths = [re.sub(r"([$ :])", r"$\1", path) for path in (output, *inputs)]
        self.lines.append(f"build {paths[0]}: {rule} {' '.join(paths[1:])}")
        for name, value in (("program", program), ("flags", flags)):
            self.lines.append(f"  {name} = " + shlex.join(value).replace("$", "$$"))
        return output

    def compile(self, source: Path, program: list[str], flags: list[str]) -> str:
        rule = "nvcc" if source.suffix == ".cu" else "cxx"
        return self.add(rule, f"{source.relative_to(ROOT)}.o", [str(source)], program, flags)

    def run(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "build.ninja").write_text("\n".join(self.lines) + "\n")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        command = [sys.executable, "-m", "ninja", "-C", str(self.directory), "-j", jobs]
        if subprocess.run(command).returncode != 0:
            raise SystemExit(
                "fastpref's compiled libraries did not build, see above. "
                "FASTPREF_SKIP_EXT=1 installs the package without them."
            )


def whole_program(flags: list[str]) -> list[str]:
    """``WHOLE``, where compiler and linker can."""
    return WHOLE if complaint([*compiler(), *flags, *WHOLE], "int x;\n", ".cpp") is None else []


def plan_ops(ninja: Ninja, output: str) -> dict[str, str]:
    """Add the operator library to the ninja file. Returns the facts of its build."""
    torch = torch_directory()
    includes = ["-isystem", str(torch / "include"), f"-I{CSRC}", *STABLE_ABI]
    own = words("CXXFLAGS")
    link = link_flags([f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu"])
    try:
        nvcc = find_nvcc()
        architectures = cuda_architectures(nvcc)
        without = None
    except Unavailable as reason:
        if os.environ.get("FASTPREF_BUILD_CUDA") == "1":
            raise SystemExit(f"FASTPREF_BUILD_CUDA=1 cannot be followed: {reason}.") from None
        without = str(reason)
    # Where nvcc links, it is not told of the compiler's own way.
    operators = SMALL if without is None else [*SMALL, *whole_program(SMALL)]
    objects = [
        ninja.compile(source, compiler(), [*flags, *own, *includes])
        for source, flags in [
            (CSRC / "ops.cpp", operators),
            *((path, operators) for path in sorted(CSRC.glob("cpu/*_ops.cpp"))),
            *((path, KERNELS) for path in sorted(CSRC.glob("cpu/row_kernels_*.cpp"))),
        ]
    ]
    facts: dict[str, str] = {
        "torch": importlib.metadata.version("torch"),
        "compiler": output_of([*compiler(), "--version"])[0],
        "flags": shlex.join([*KERNELS, *own]),
    }
    if without is not None:
        ninja.add("link", output, objects, compiler(), [*operators, *link])
        return facts | {"cuda": f"not built: {without}"}
    cuda_flags = [*NVCC, *gencode(architectures), *includes]
    objects += [ninja.compile(source, [nvcc], cuda_flags) for source in cuda_sources()]
    # nvcc links, because it knows where its static runtime is.
    nvcc_link = ["-cudart=static", *(through_nvcc(word) for word in link)]
    ninja.add("link", output, objects, [nvcc], nvcc_link)
    release = next(line for line in output_of([nvcc, "--version"]) if "release" in line)
    return facts | {"cuda": ";".join(architectures), "nvcc": release}


def plan_module(ninja: Ninja, output: str) -> dict[str, str]:
    """Add the pybind11 module to the ninja file."""
    whole = whole_program(MODULE)
    own = [*MODULE, *whole, *words("CXXFLAGS")]
    flags = [*own, *(f"-isystem{path}" for path in module_includes())]
    objects = [ninja.compile(CSRC / "module.cpp", compiler(), flags)]
    ninja.add("link", output, objects, compiler(), [*whole, *link_flags([])])
    return {"python": platform.python_version()}


def git_commit() -> dict[str, str]:
    # Without a .git of its own ROOT may lie in another project's checkout.
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return {}
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return {"git_commit": done.stdout.strip()} if done.returncode == 0 else {}


def write_facts(directory: Path, facts: dict[str, str]) -> None:
    text = json.dumps(facts | git_commit(), indent=2)
    (directory / "_build_info.json").write_text(text + "\n")


class BuildLibraries(build_ext):
    """Hands the libraries to ninja, whose objects stay in build/ from one build to the next."""

    def get_ext_filename(self, fullname: str) -> str:
        name = super().get_ext_filename(fullname)
        is_ops = fullname.split(".")[-1] == "_ops"
        return str(Path(name).with_name("_ops.so")) if is_ops else name

    def build_extensions(self) -> None:
        if MISSING:
            raise SystemExit(f"fastpref: {MISSING}.")
        # One for all Pythons: nothing of _ops depends on them, and _C has a name of its own.
        ninja = Ninja(ROOT / "build" / f"ninja-{sysconfig.get_platform()}")
        plans = {"fastpref._ops": plan_ops, "fastpref._C": plan_module}
        targets = [Path(self.get_ext_fullpath(extension.name)) for extension in self.extensions]
        self.facts: dict[str, str] = {}
        for extension, target in zip(self.extensions, targets, strict=True):
            self.facts |= plans[extension.name](ninja, target.name)
        ninja.run()
        for target in targets:
            self.mkpath(str(target.parent))
            # A process that has the old library mapped keeps that file; this is a new one.
            target.unlink(missing_ok=True)
            self.copy_file(str(ninja.directory / target.name), str(target))

    def run(self) -> None:
        super().run()
        write_facts(ROOT / "fastpref" if self.inplace else built(self), self.facts)


class BuildPython(build_py):
    """Where no library is built, this is what writes the reason."""

    def run(self) -> None:
        super().run()
        if not self.distribution.ext_modules:
            facts = {"reason": OPS_REASON}
            write_facts(ROOT / "fastpref" if self.editable_mode else built(self), facts)


def built(command: build_ext | build_py) -> Path:
    return Path(command.build_lib, "fastpref")


def extensions() -> list[Extension]:
    sources = [CSRC / "ops.cpp", *sorted(CSRC.glob("cpu/*.cpp")), *cuda_sources()]
    libraries = [Extension("fastpref._ops", [str(path.relative_to(ROOT)) for path in sources])]
    if MISSING:
        return libraries
    try:
        module_includes()
    except Unavailable as reason:
        print(f"fastpref: building without fastpref._C: {reason}.", file=sys.stderr)
        return libraries
    return [*libraries, Extension("fastpref._C", ["csrc/module.cpp"])]


def repository() -> str | None:
    """The address of the repository, where pyproject.toml has one."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^Repository = "(.+?)/?"$', text, re.MULTILINE)
    return found and found[1]


def absolute(text: str, address: str | None) -> str:
    """Markdown whose relative links and pictures are those of the repository, as a package index
    needs them; without an address, links to files are their text and pictures are left out."""

    def link(match: re.Match[str]) -> str:
        picture, name, target = match.groups()
        if re.match(r"https?:|#|mailto:", target):
            return match[0]
        if address is None:
            return "" if picture else name
        return f"{picture}[{name}]({address}/{'raw' if picture else 'blob'}/main/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", link, text)


OPS_REASON = MISSING = None
try:
    require_ops()
except Missing as reason:
    # Commands that build nothing do without.
    MISSING = str(reason)
except Unavailable as reason:
    if flag("FASTPREF_FORCE_EXT"):
        raise SystemExit(f"FASTPREF_FORCE_EXT cannot be followed: {reason}.") from None
    OPS_REASON = str(reason)
    print(f"fastpref: building without compiled libraries: {reason}.", file=sys.stderr)

setup(
    long_description=absolute((ROOT / "README.md").read_text(encoding="utf-8"), repository()),
    long_description_content_type="text/markdown",
    ext_modules=[] if OPS_REASON else extensions(),
    cmdclass={"build_ext": BuildLibraries, "build_py": BuildPython},
)
