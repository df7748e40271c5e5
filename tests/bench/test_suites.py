# SPDX-License-Identifier: Apache-2.0
"""Every implementation that is installed does the work of its suite, in every mode."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastpref import objectives
from fastpref.bench import denoising
from fastpref.bench.cases import ALLOWED
from fastpref.bench.experiment import MODES, Case, Experiment, Mode, errors, step
from fastpref.bench.losses import OVERFLOWING
from fastpref.bench.suites import SUITES
from fastpref.bench.training import LAYERS, training_experiment
from fastpref.bench.work import Shape, Work, make_work

SHAPE = Shape(8, 16, 32, 300)
# The others have no rows to tell apart, or tests of their own.
OTHERS = ("heads", "step", "head", "call", "low-rank", "denoising")
SWEPT = [(what, mode) for what in ("head", "call") for mode in MODES if mode != "forward"]
LOSSES = [what for what in SUITES if what not in OTHERS]
EVERY = [(what, mode) for what, suite in SUITES.items() for mode in suite.modes]


@functools.cache
def experiment(what: str, mode: Mode, device: str = "cpu") -> Experiment:
    return SUITES[what].experiment(Case(what, mode, "float32", SHAPE, device=device))


@pytest.mark.heavy
@pytest.mark.parametrize(
    "what, mode",
    [pytest.param(*one, marks=pytest.mark.slow if one in SWEPT else ()) for one in EVERY],
)
def test_candidates_agree_with_float64(what: str, mode: Mode) -> None:
    if SUITES[what].unavailable is not None:
        pytest.skip(str(SUITES[what].unavailable))
    found = experiment(what, mode)
    worst = {}
    for one in found.candidates:
        if one.unavailable is None:
            # What compiles runs as it is written.
            with torch.compiler.set_stance("force_eager"):
                outcome, exact = one.sampled(one.run()), one.exact()
            worst[one.name] = errors(outcome, exact).largest
            assert exact.loss.dtype == torch.float64
            assert bool(outcome.gradients) == (mode != "forward")
    assert len(worst) > 2 and max(worst.values()) < 2e-5, worst


@pytest.mark.parametrize("what", LOSSES)
@pytest.mark.parametrize("length", [16, 256])
def test_every_scored_row_counts(what: str, length: int) -> None:
    """Else a wrong row would pass, and fastpref, which skips rows without gradient, would do less
    than the others."""
    shape = Shape(8, length, 32, 300)
    case = Case(what, "frozen head", "float32", shape)
    (gradient,) = SUITES[what].experiment(case).candidates[0].exact().gradients
    work = case.work()
    sizes = work.rows(gradient).norm(dim=-1)
    sizes = sizes[sizes > 0] if what == "grpo" else sizes  # clipped
    assert len(sizes) > 0.9 * shape.scored
    # Of the responses: a token's own share falls with its probability.
    means = [one[one > 0].mean() for one in gradient.norm(dim=-1)]
    assert max(means) < 100 * min(means)
    assert sizes.min() > 0


@pytest.mark.parametrize("what", LOSSES)
def test_the_loss_depends_on_the_scores(what: str) -> None:
    """What is checked without gradients is the loss alone."""
    case = Case(what, "forward", "float32", SHAPE)
    other = make_work(SHAPE, torch.float32, seed=1)
    plain = next(
        one for one in SUITES[what].experiment(case).candidates if one.name == "plain torch"
    )
    assert isinstance(plain.run, functools.partial)
    loss, work, mode = plain.run.args
    moved = replace(work, hidden=other.hidden)
    assert errors(step(loss, moved, mode), plain.exact()).loss > 100 * ALLOWED["float32"].loss


@pytest.mark.parametrize("what", SUITES)
def test_running_again_is_the_same_work(what: str) -> None:
    """Nothing that a run leaves behind changes the next one: gradients, steps of an optimizer."""
    if SUITES[what].unavailable is not None:
        pytest.skip(str(SUITES[what].unavailable))
    found = experiment(what, "trainable head")
    names = ("plain torch", "dpo", "fastpref, torch", "dense")
    plain = next(one for one in found.candidates if one.name in names)
    first = plain.sampled(plain.run())
    found.limit()
    assert errors(plain.sampled(plain.run()), first).largest == 0


def test_a_run_that_failed_leaves_nothing_behind() -> None:
    pytest.importorskip("transformers")
    case = Case("step", "trainable head", "float32", SHAPE)
    found = training_experiment(case)
    plain = next(one for one in found.candidates if one.name == "plain torch")
    first = plain.run()

    def breaks(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
        (hidden.sum() * weight.sum()).backward(retain_graph=True)
        raise RuntimeError("broken")

    def spoils(work: Work, hidden: Tensor, weight: Tensor) -> Tensor:
        return hidden.sum() * weight.sum() * float("nan")

    assert isinstance(plain.run, functools.partial)
    with pytest.raises(RuntimeError, match="broken"):
        plain.run.func(breaks)
    assert errors(plain.run(), first).largest == 0
    plain.run.func(spoils)
    assert errors(plain.run(), first).largest == 0


@pytest.mark.parametrize("what", [*LOSSES, "step"])
def test_the_alternatives_are_there(what: str) -> None:
    if SUITES[what].unavailable is not None:
        pytest.skip(str(SUITES[what].unavailable))
    names = [one.name for one in experiment(what, "trainable head").candidates]
    assert len(set(names)) == len(names) and names[0] == "fastpref"
    wanted = {"fastpref, torch backend", "fastpref, recompute", "plain torch", "torch.compile"}
    if what != "ddo":
        wanted.add("Liger")
    if what != "divergence":
        wanted |= {"F.linear_cross_entropy", "TRL fused head", "Cut Cross-Entropy"}
    if what == "score":
        wanted.add(OVERFLOWING)
    assert wanted <= set(names)
    frozen = [one.name for one in experiment(what, "frozen head").candidates]
    assert "fastpref, recompute" not in frozen


def test_what_needs_a_gpu_says_so() -> None:
    (one,) = [
        one for one in experiment("score", "forward").candidates if one.name == "Cut Cross-Entropy"
    ]
    assert one.unavailable == "needs CUDA"


@pytest.mark.parametrize("masked", [0.0, 0.25, 0.5])
def test_as_many_rows_are_predicted_as_the_products_have(masked: float) -> None:
    shape = Shape(8, 16, 32, 300, masked)
    predicted = denoising._drawn(Case("denoising", "frozen head", "float32", shape)).model
    assert predicted.numel() == shape.scored * shape.hidden_size


@pytest.mark.parametrize("mode", SUITES["denoising"].modes)
def test_a_denoising_loss_is_set_beside_the_products_of_a_head(mode: Mode) -> None:
    found = experiment("denoising", mode)
    with FlopCounterMode(display=False) as counted:
        found.limit()
    products = 2 * SHAPE.scored * SHAPE.hidden_size * SHAPE.vocab_size
    assert counted.get_total_flops() == MODES[mode] * products


@pytest.mark.parametrize("mode", SUITES["heads"].modes)
def test_heads_are_all_objectives(mode: Mode) -> None:
    names = [one.name for one in experiment("heads", mode).candidates]
    assert names == list(objectives.names())


def test_overflowing_rows_are_checked_against_their_own_answer() -> None:
    candidates = experiment("score", "frozen head").candidates
    own = next(one for one in candidates if one.name == "fastpref")
    harder = next(one for one in candidates if one.name == OVERFLOWING)
    assert errors(harder.run(), own.exact()).largest > 1e-2


@pytest.mark.parametrize("mode", MODES)
def test_a_step_updates_the_whole_model(mode: Mode) -> None:
    pytest.importorskip("transformers")
    found = training_experiment(Case("step", mode, "float32", SHAPE))
    gradients = found.candidates[0].run().gradients
    if mode == "forward":
        assert gradients == ()
        return
    # Embedding, a norm before and after each layer's two parts and at the end, seven matrices.
    assert len(gradients) == 2 + 9 * LAYERS + (mode == "trainable head")
    assert all(float(one.norm()) > 0 for one in gradients)
