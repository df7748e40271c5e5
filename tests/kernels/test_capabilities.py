# SPDX-License-Identifier: Apache-2.0
"""Every NVIDIA GPU that torch serves ends in a tier that works: the rows tier's kernels compile for
all, and what the fused kernels do not know goes to it."""

import subprocess
import sys

import pytest
import torch

from fastpref.scoring import backends
from fastpref.scoring.backends import rows, verdict
from fastpref.scoring.backends import triton as triton_backend
from fastpref.scoring.backends.choice import Size

CODE = """
import re, sys
from fastpref.kernels import resources, variants

wanted = ("exp_rows write statistics", "join_shares write", "logit_grad_rows entropy",
          "target_logits", "row_scores store statistics", "scale_rows", "forward_kl")
for element in ("bf16", "fp16"):
    for variant in variants.variants(90, element):
        if variant.name in wanted:
            compiled = resources.build(variant, int(sys.argv[1]))
            usage = resources._dump(compiled.asm["cubin"], "-res-usage")
            print(element, variant.name, re.search(r"STACK:(\\d+)", usage)[1], sep=":")
"""


@pytest.mark.heavy
@pytest.mark.parametrize(
    "capability",
    [
        75,
        *(
            pytest.param(one, marks=pytest.mark.slow)
            for one in (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
        ),
    ],
)
def test_the_rows_tier_compiles(capability: int) -> None:
    command = [sys.executable, "-c", CODE, str(capability)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = done.stdout.split()
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 13, found  # exp_rows writes no halves
    assert all(line.endswith(":0") for line in lines), lines


@pytest.mark.parametrize(
    "capability, fused_serves",
    [
        *(((7, 5), False), ((8, 0), True), ((8, 6), True), ((8, 9), True), ((9, 0), True)),
        *(((10, 0), True), ((10, 3), True), ((11, 0), True), ((12, 0), True), ((12, 1), True)),
        *(((13, 0), False), ((20, 1), False)),
    ],
)
@pytest.mark.parametrize("tuned", [None, "rows", "triton"])
def test_every_card_has_a_tier(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    fused_serves: bool,
    tuned: str | None,
) -> None:
    """The fused kernels only where they know the chip, and only by a verdict."""
    for module in (triton_backend, rows):
        monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(verdict, "verdict", lambda device, size: tuned)
    size = Size(torch.bfloat16, 8192, 4096, 128256)
    chosen = backends.choose("auto", torch.device("cuda", 0), size)
    assert chosen == ("triton" if fused_serves and tuned == "triton" else "rows")
    assert (backends.unavailable_reason("triton", "cuda") is None) == fused_serves
