# SPDX-License-Identifier: Apache-2.0
"""The README: every block runs alone, as a reader pastes it; and the pages: their blocks, their
links, and what is generated in them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastpref.objectives import registry

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
if not (ROOT / "setup.py").exists():
    pytest.skip("not run from a checkout", allow_module_level=True)

PAGES = sorted(
    path
    for pattern in ("*.md", "*/*.md", "fastpref/**/*.md")
    for path in ROOT.glob(pattern)
    if not any(part.startswith((".", "build", "dist")) for part in path.relative_to(ROOT).parts)
)
# Of pages whose blocks stand by themselves; those of the others belong together or to a trainer,
# and have tests where these have theirs.
ALONE = ("nn", "optim", "integrations/causal_lm")
TOGETHER = ("preference", "scoring")


def blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def cases() -> list[object]:
    found: list[object] = []
    for place, block in enumerate(blocks(README)):
        found.append(pytest.param(block, id=f"README {place}"))
    for name in ALONE:
        for place, block in enumerate(blocks(ROOT / "fastpref" / name / "README.md")):
            found.append(pytest.param(block, id=f"{name} {place}", marks=pytest.mark.slow))
    for name in TOGETHER:
        together = "\n".join(blocks(ROOT / "fastpref" / name / "README.md"))
        found.append(pytest.param(together, id=name, marks=pytest.mark.slow))
    return found


@pytest.mark.heavy
@pytest.mark.parametrize("block", cases())
def test_blocks_run_alone(block: str, tmp_path: Path) -> None:
    if "trl" in block:
        pytest.importorskip("trl")
    if "transformers" in block:
        pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.heavy
def test_what_the_readme_says_is_printed_is(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (block,) = (one for one in blocks(README) if "LlamaConfig" in one)
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=True)
    mean, loss, plan = re.findall(r"tensor\((-?[\d.]+)|^(.*keep.*)$", done.stdout, re.MULTILINE)[:3]
    assert abs(float(mean[0]) + 6.9) < 0.1
    assert abs(float(loss[0]) - 0.69) < 0.1
    assert "keep on" in done.stdout and plan


def test_the_readme_is_as_long_as_a_reader_reads() -> None:
    assert 700 <= len(README.read_text(encoding="utf-8").split()) <= 1000


def anchors(path: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def located(page: Path, name: str) -> Path:
    file = (page.parent / name).resolve()
    if not file.exists() and file.is_relative_to(ROOT / "kernels"):  # of a source archive
        return ROOT / "fastpref" / file.relative_to(ROOT)
    return file


def dead(path: Path, text: str) -> list[str]:
    """Links of a page to what is not there; those to other sites are not followed."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        file = located(path, name) if name else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert dead(page, page.read_text(encoding="utf-8")) == []


def test_a_dead_link_is_found() -> None:
    text = (
        "[a](setup.py) [b](nowhere.md) [c](README.md#nothing) [d](README.md#numbers) [e](#memory)"
    )
    assert dead(README, text) == ["nowhere.md", "README.md#nothing"]


def test_every_page_and_every_recipe_is_linked() -> None:
    linked = set()
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s#]+)", page.read_text(encoding="utf-8")):
            linked.add(located(page, target))
    pages = {page for page in PAGES if page.name == "README.md" and page != README}
    # Those of a folder by its own path, not through the link to it.
    pages = {page for page in pages if page.resolve() == page}
    assert {page.relative_to(ROOT).as_posix() for page in pages - linked} == set()
    recipes = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    scripts = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert {name for name in scripts if f"]({name})" not in recipes} == set()


def test_names_of_trl_are_those_that_the_recipes_say() -> None:
    recipes = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    other = {
        (theirs, ours)
        for unit in ("pair", "unit", "token")
        for theirs, ours in registry.loss_types(unit).items()  # type: ignore[arg-type]
        if theirs != ours
    }
    assert other == set(re.findall(r"`(\w+)` is `(\w+)`", recipes))


def test_families_and_numbers_of_the_readme_are_the_catalogues() -> None:
    text = README.read_text(encoding="utf-8")
    count = len(registry.catalogue())
    assert (
        f"\n{count}, each with its formula" in text and f"(DPO and {count - 1} relatives)" in text
    )
    section = text.split("## Objectives")[1].split("\n## ")[0]
    units = ("Pairs", "Single responses", "Ranked lists", "Groups of sampled responses")
    for title, unit in zip(units, ("pair", "unit", "list", "token"), strict=True):
        (line,) = re.findall(rf"^- {title}: (.*)$", section, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", line):
            assert registry.registered(name).unit == unit, name
