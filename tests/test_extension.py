# SPDX-License-Identifier: Apache-2.0
"""Loading the compiled libraries, what they depend on, and what is said when one is missing."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastpref
from fastpref import _extension

compiled = pytest.mark.skipif(
    not _extension.OPS_LIBRARY.exists(), reason="fastpref/_ops.so was not built here"
)
native = pytest.mark.skipif(
    _extension.native_module() is None, reason="fastpref/_C was not built here"
)
inspectable = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("nm") is None, reason="needs nm on Linux"
)


def undefined_symbols(library: Path) -> list[str]:
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    )
    return [line.split()[-1] for line in listing.stdout.splitlines()]


def needed_libraries(library: Path) -> list[str]:
    dynamic = subprocess.run(
        ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
    )
    return re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic.stdout)


@compiled
@inspectable
def test_ops_needs_only_the_stable_interface_of_torch() -> None:
    system = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_|^(_ITM_|__gmon_start__|__cxa_finalize)")
    symbols = [
        name for name in undefined_symbols(_extension.OPS_LIBRARY) if not system.search(name)
    ]
    assert "aoti_torch_library_init_def" in symbols
    assert [name for name in symbols if not name.startswith(("aoti_torch_", "torch_"))] == []


@compiled
@inspectable
def test_ops_loads_no_library_of_python_or_cuda() -> None:
    torch_libraries = {name for name in needed_libraries(_extension.OPS_LIBRARY) if "torch" in name}
    assert torch_libraries == {"libtorch.so", "libtorch_cpu.so"}
    for name in needed_libraries(_extension.OPS_LIBRARY):
        assert not name.startswith(("libpython", "libcu", "libc10"))


@native
@inspectable
def test_native_module_loads_no_torch() -> None:
    module = _extension.native_module()
    assert module is not None
    assert module.__file__ is not None
    libraries = needed_libraries(Path(module.__file__))
    assert "libc.so.6" in libraries
    assert [name for name in libraries if name.startswith(("libtorch", "libc10"))] == []


@compiled
def test_operators_are_there_and_build_facts_are_recorded() -> None:
    assert _extension.ops_unavailable_reason() is None
    assert torch.ops.fastpref.cpu_capability() in (0, 1, 2)
    facts = _extension.build_info()
    assert {"torch", "compiler", "flags", "cuda"} <= set(facts)
    assert "-fno-math-errno" in facts["flags"]
    assert "reason" not in facts


def test_missing_library_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_extension, "OPS_LIBRARY", tmp_path / "_ops.so")
    monkeypatch.setattr(_extension, "_BUILD_INFO", tmp_path / "_build_info.json")
    reason = _extension.ops_unavailable_reason.__wrapped__()
    assert reason == "_ops.so is not built; run `pip install -e .` in the checkout"


def test_missing_library_repeats_what_the_build_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "_build_info.json").write_text(json.dumps({"reason": "no compiler"}))
    monkeypatch.setattr(_extension, "OPS_LIBRARY", tmp_path / "_ops.so")
    monkeypatch.setattr(_extension, "_BUILD_INFO", tmp_path / "_build_info.json")
    assert _extension.ops_unavailable_reason.__wrapped__() == "no compiler"


def test_broken_library_is_a_reason_not_an_exception(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = tmp_path / "_ops.so"
    library.write_text("no shared object")
    monkeypatch.setattr(_extension, "OPS_LIBRARY", library)
    reason = _extension.ops_unavailable_reason.__wrapped__()
    assert reason is not None
    assert "does not load" in reason
    assert torch.__version__ in reason


@pytest.mark.parametrize("text", ["", "{", None])
def test_unreadable_build_facts_are_empty(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None
) -> None:
    path = tmp_path / "_build_info.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(_extension, "_BUILD_INFO", path)
    assert _extension.build_info() == {}


@pytest.fixture
def without_operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_extension, "ops_unavailable_reason", lambda: "it fell off")
    _extension.warn_of_missing_operators.cache_clear()
    yield
    _extension.warn_of_missing_operators.cache_clear()


SAID = r"on the CPU without.*it fell off.*`pip install --force-reinstall .* \.`.*`fastpref env`"


@pytest.mark.skipif(not sys.platform.startswith(("linux", "darwin")), reason="warns there only")
@pytest.mark.usefixtures("without_operators")
def test_the_first_scoring_on_the_cpu_says_what_is_missing_and_what_mends_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(backend="torch")  # asked for
    with pytest.warns(RuntimeWarning, match=SAID) as caught:
        score()
        score(rows=7)
        fastpref.preference_loss(torch.randn(2, 3, 4), torch.randn(9, 4), WORDS, "simpo")
    assert len(caught) == 1


@pytest.mark.skipif(not sys.platform.startswith(("linux", "darwin")), reason="warns there only")
@pytest.mark.usefixtures("without_operators")
def test_errors_of_diffusion_say_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastpref.diffusion.backends.ops_unavailable_reason", lambda: "fell off")
    with pytest.warns(RuntimeWarning, match=SAID):
        fastpref.diffusion.log_ratio(*torch.randn(3, 2, 8))


WORDS = torch.ones(2, 3, dtype=torch.int64)


def score(rows: int = 5, **options: Any) -> None:
    target = torch.zeros(rows, dtype=torch.int64)
    options = fastpref.ScoringOptions(**options)
    fastpref.linear_logprob(torch.randn(rows, 4), torch.randn(9, 4), target, options=options)


@pytest.mark.filterwarnings("error")
def test_with_the_operators_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "ops_unavailable_reason", lambda: None)
    _extension.warn_of_missing_operators.cache_clear()
    _extension.warn_of_missing_operators()


def test_native_module_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastpref._C", None)
    _extension._native_module.cache_clear()
    try:
        assert _extension.native_module() is None
        assert "fastpref._C" in (_extension.native_module_unavailable_reason() or "")
    finally:
        _extension._native_module.cache_clear()


@native
@pytest.mark.parametrize(
    ("request_", "detected", "expected", "said"),
    [
        (None, "avx512", "avx512", ""),
        ("", "avx2", "avx2", ""),
        ("baseline", "avx512", "baseline", ""),
        ("avx2", "avx512", "avx2", ""),
        ("avx2", "avx2", "avx2", ""),
        ("avx512", "avx2", "avx2", "avx2 at most"),
        ("avx2", "baseline", "baseline", "baseline at most"),
        ("AVX2", "avx512", "avx512", "expected baseline, avx2 or avx512"),
    ],
)
def test_capability_may_be_lowered_and_never_raised(
    request_: str | None, detected: str, expected: str, said: str
) -> None:
    module = _extension.native_module()
    assert module is not None
    capability, note = module.choose_cpu_capability(request_, detected)
    assert capability == expected
    assert bool(note) == bool(said)
    assert said in note


@native
def test_capability_needs_every_feature_of_its_set() -> None:
    module = _extension.native_module()
    assert module is not None
    present = {name for name, there in module.cpu_features().items() if there}
    avx2 = {"avx2", "fma", "f16c"} <= present
    avx512 = avx2 and {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= present
    expected = "avx512" if avx512 else "avx2" if avx2 else "baseline"
    if "FASTPREF_CPU_CAPABILITY" not in os.environ:
        assert module.cpu_capability() == expected


@pytest.mark.heavy
@native
@compiled
def test_both_libraries_follow_the_environment() -> None:
    code = (
        "import torch; from fastpref import _extension as e; m = e.native_module();"
        "e.ops_unavailable_reason();"
        "print(torch.ops.fastpref.cpu_capability(), m.cpu_capability(), m.cpu_capability_note())"
    )
    environment = {**os.environ, "FASTPREF_CPU_CAPABILITY": "baseline"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["0", "baseline"]
