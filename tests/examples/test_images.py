# SPDX-License-Identifier: Apache-2.0
"""Examples of image models: they learn what is preferred, and draw it."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fastpref.diffusion import preset
from tests.examples.loading import load, printed

pytestmark = pytest.mark.heavy


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)


def reds(text: str) -> tuple[float, float]:
    found = re.search(r"red before ([\d.]+)   after ([\d.]+)", text)
    assert found is not None
    return float(found[1]), float(found[2])


@pytest.mark.slow
def test_flow_dpo(capsys: pytest.CaptureFixture[str]) -> None:
    load("flow_dpo").main()
    text = capsys.readouterr().out
    before, after = reds(text)
    losses = printed(text, "loss")
    assert 0.3 < before < 0.7 and after > 0.9
    assert losses[0] == pytest.approx(0.6931, abs=1e-4) and losses[-1] < 0.2
    assert Path("flow_dpo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("network", ["its own", "diffusers"])
def test_diffusion_dpo(network: str, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    if network == "diffusers":
        pytest.importorskip("diffusers")
    example = load("diffusion_dpo")
    if network == "its own":
        monkeypatch.setattr(example, "find_spec", lambda name: None)
    example.main()
    text = capsys.readouterr().out
    before, after = reds(text)
    assert 0.3 < before < 0.7 and after > 0.85
    assert printed(text, "implicit_acc")[-1] > 0.9
    assert printed(text, "raw_model_loss")[0] == printed(text, "raw_ref_loss")[0]
    assert Path("diffusion_dpo.png").read_bytes().startswith(b"\x89PNG")


def test_the_script_s_loss_block_is_the_same() -> None:
    """diffusers' own, in float64, on what the example's networks predict."""
    example = load("diffusion_dpo")
    torch.manual_seed(0)
    model, reference = example.ConvUNet(), example.ConvUNet()
    images, beta = example.pairs(4), 700.0
    torch.manual_seed(1)
    found = example.loss_of(model, reference, images, beta)
    torch.manual_seed(1)
    noise = torch.randn(images[:4].shape).repeat(2, 1, 1, 1)
    times = torch.randint(example.TIMES, (4,)).repeat(2)
    bar = example.BAR[times].view(-1, 1, 1, 1)
    seen = bar.sqrt() * images + (1 - bar).sqrt() * noise
    m, r = (
        ((net(seen, times).double() - noise.double()) ** 2).mean((1, 2, 3))
        for net in (model, reference)
    )
    inside = -0.5 * beta * ((m[:4] - m[4:]) - (r[:4] - r[4:]))
    want = -torch.nn.functional.logsigmoid(inside).mean()
    torch.testing.assert_close(found.loss.double(), want, rtol=1e-4, atol=1e-5)
    assert preset("diffusers_dpo_sdxl").weight == 0.5


def test_the_network_of_diffusers() -> None:
    if find_spec("diffusers") is None:
        pytest.skip("diffusers is not installed")
    example = load("diffusion_dpo")
    model = example.build()
    assert isinstance(model, example.DiffusersUNet)
    output = example.loss_of(model, example.frozen_copy(model), example.pairs(2), 500.0)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(0.6931, abs=1e-3)
    assert all(one.grad is not None for one in model.parameters())
