# SPDX-License-Identifier: Apache-2.0
"""Running moments: the averages, resuming, and two ranks as one batch."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fastpref.objectives import RunningMoments, alpha_dpo, bco_pair

BATCHES = torch.randn(5, 12, generator=torch.Generator().manual_seed(3)) * 30 + 4


def run(batches, moments=None, group=None):
    moments = moments or RunningMoments()
    for batch in batches:
        moments.update(batch, group)
    return moments


def bits(moments):
    return moments.mean.item(), moments.std.item(), moments.updates


def test_averages_of_means_and_of_deviations_from_the_first_batch_on():
    moments = run(BATCHES.double(), RunningMoments(decay=0.7))
    batches = BATCHES.double().numpy()
    mean, std = batches[0].mean(), batches[0].std(ddof=1)
    for batch in batches[1:]:
        mean = 0.7 * mean + 0.3 * batch.mean()
        std = 0.7 * std + 0.3 * batch.std(ddof=1)
    np.testing.assert_allclose([moments.mean, moments.std], [mean, std], rtol=1e-14)
    assert moments.mean.dtype == torch.float64


def test_no_shift_and_no_adaptive_margin_before_the_first_update():
    moments = RunningMoments()
    assert moments.mean.shape == moments.std.shape == () and bits(moments) == (0, 0, 0)
    chosen, rejected, *reference = -50 * torch.rand(4, 6)
    shifted = bco_pair(chosen, rejected, *reference, delta=moments.mean)
    assert torch.equal(shifted.losses, bco_pair(chosen, rejected, *reference).losses)
    lengths = {"chosen_lengths": torch.full((6,), 9), "rejected_lengths": torch.full((6,), 5)}
    state = {"running_mean": moments.mean, "running_std": moments.std}
    adaptive = alpha_dpo(chosen, rejected, *reference, **state, **lengths, alpha=0.2)
    fixed = alpha_dpo(chosen, rejected, *reference, **state, **lengths, alpha=0.0)
    assert torch.equal(adaptive.losses, fixed.losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("values", [[0.1] * 3, [-0.7] * 7, [1e4 + 0.3] * 11, [5.3]])
def test_equal_values_have_exactly_their_mean_and_no_deviation(values, dtype):
    values = torch.tensor(values, dtype=dtype)
    moments = run([values])
    assert moments.mean.dtype == moments.std.dtype == torch.promote_types(dtype, torch.float32)
    assert moments.mean == values[0] and moments.std == 0


def test_far_values_keep_the_digits_of_the_deviation():
    values = torch.tensor([4000.0, 4000.5, 4001.0])
    assert run([values]).std == 0.5


def test_an_empty_batch_changes_nothing():
    moments = run(BATCHES)
    before = bits(moments)
    moments.update(torch.zeros(0))
    assert bits(moments) == before
    assert bits(run([torch.zeros(0), BATCHES[0]])) == bits(run([BATCHES[0]]))


def test_a_tensor_taken_before_an_update_keeps_its_value():
    moments = run(BATCHES[:2])
    mean, value = moments.mean, moments.mean.item()
    moments.update(BATCHES[2].clone().requires_grad_())
    assert mean.item() == value != moments.mean.item()
    assert not moments.mean.requires_grad and not moments.std.requires_grad


@pytest.mark.parametrize("done", [0, 1, 3])
def test_training_resumes_to_the_bit(tmp_path, done):
    whole = run(BATCHES)
    first = run(BATCHES[:done])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = RunningMoments()
    second.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert bits(run(BATCHES[done:], second)) == bits(whole)


def test_states_are_copies():
    moments = run(BATCHES[:2])
    state, before = moments.state_dict(), bits(moments)
    twin = RunningMoments()
    twin.load_state_dict(state)
    state["mean"].zero_(), state["std"].zero_()
    assert bits(twin) == bits(moments) == before


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decay_is_checked(decay):
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
        RunningMoments(decay=decay)


def on_a_rank(rank):
    return bits(run(BATCHES.view(5, 2, 6)[:, rank], group=dist.group.WORLD))


@pytest.mark.heavy
def test_two_ranks_come_to_the_bits_of_one_process(two_ranks):
    for found in two_ranks(on_a_rank):
        assert found == bits(run(BATCHES))
