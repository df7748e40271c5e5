# SPDX-License-Identifier: Apache-2.0
"""The pages of what stands around the loss name all that is public, and their examples run."""

import re
from pathlib import Path
from types import ModuleType

import pytest

from fastpref import curriculum, diagnostics, optim, reference

# Of results, which the pages do not list.
RESULTS = {
    "Displacement",
    "LengthBias",
    "Likelihoods",
    "MinimaxPairs",
    "MixtureWeights",
    "RankedPairs",
    "SeparabilityReport",
    "SpinalTrace",
    "StepPairs",
}


@pytest.mark.parametrize("package", [curriculum, diagnostics, optim, reference])
def test_a_page(package: ModuleType) -> None:
    path = Path(str(package.__file__)).with_name("README.md")
    if not path.exists():
        pytest.skip("not run from a checkout")
    text = path.read_text(encoding="utf-8")
    public = set(package.__all__) - RESULTS
    assert {name for name in public if f"`{name}" not in text} == set()
    files = set(re.findall(r"`(\w+\.py)`", text))
    assert all(path.with_name(name).exists() for name in files)
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 1
    exec(examples[0], {})
