# SPDX-License-Identifier: Apache-2.0
"""The visual demo: its images, its flow, and one run of the command from end to end."""

import json
from pathlib import Path

import pytest
import torch

from fastpref.cli.main import main
from fastpref.demo import DemoError, flow, shapes, visual


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_images_are_red_or_blue() -> None:
    generator = torch.Generator().manual_seed(0)
    images = shapes.pairs(50, generator)
    assert images.shape == (100, 3, shapes.SIZE, shapes.SIZE)
    assert float(images.min()) >= -1 and float(images.max()) <= 1
    assert shapes.red_share(images[:50]) == 1 and shapes.red_share(images[50:]) == 0
    assert images.flatten(1).unique(dim=0).shape[0] == 100


def test_a_step_of_the_sampler_follows_the_velocity() -> None:
    """Of a model that knows the velocity to one image it ends there, from any noise."""
    wanted = shapes.draw(torch.tensor([True]))

    def model(images: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return (images - wanted) / times.view(-1, 1, 1, 1)

    made = flow.sample(model, 3)
    torch.testing.assert_close(made, wanted.expand(3, -1, -1, -1), rtol=1e-4, atol=1e-4)


def test_pairs_share_noise_and_time() -> None:
    images = shapes.pairs(4)
    seen, times, velocity = flow.noised_pairs(images)
    assert torch.equal(*times.chunk(2))
    noise = velocity + images
    torch.testing.assert_close(*noise.chunk(2))
    share = times.view(-1, 1, 1, 1)
    torch.testing.assert_close(seen, (1 - share) * images + share * noise)


@pytest.mark.slow
@pytest.mark.heavy
def test_it_learns_the_preference(capsys) -> None:
    pytest.importorskip("matplotlib")
    assert main(["demo", "--visual", "--out", "out"]) == 0
    text = capsys.readouterr().out
    assert "samples are red" in text and "step 50 of 50" in text
    results = json.loads(Path("out/results.json").read_text())
    assert 0.3 < results["before"]["red_share"] < 0.7 and results["after"]["red_share"] > 0.9
    assert len(results["losses"]) == 50 and results["losses"][-1] < 0.2 < results["losses"][0]
    picture = Path("out/samples.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000


@pytest.mark.parametrize("option", ["--data", "--model"])
def test_it_makes_its_own_data_and_model(option, capsys) -> None:
    assert main(["demo", "--visual", option, "x"]) == 2
    assert f"{option} x: --visual makes its own" in capsys.readouterr().err


def test_what_stops_it(capsys, monkeypatch) -> None:
    assert main(["demo", "--visual", "--steps", "0"]) == 2
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["demo", "--visual", "--objective", "dpo"])
    monkeypatch.setattr(visual, "find_spec", lambda name: None)
    with pytest.raises(DemoError, match=r'pip install "fastpref\[visual\]"'):
        visual.require_matplotlib()
