# SPDX-License-Identifier: Apache-2.0
"""The transform against its definition in plain Python, and AdamW in some of its columns against
torch's AdamW on the dense gradient, projected."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastpref import linear_logprob, preference_loss
from fastpref.optim import DCTAdamW, WeightGradBasis, dct_matrix

N, H, V, RANK = 60, 16, 203, 4
ADAM: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-8}


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_the_transform_is_its_definition(size: int) -> None:
    matrix = dct_matrix(size, dtype=torch.float64)
    for k in range(size):
        norm = math.sqrt((1 if k == 0 else 2) / size)
        for n in range(size):
            wanted = norm * math.cos(math.pi * (n + 0.5) * k / size)
            assert matrix[n, k].item() == pytest.approx(wanted, abs=1e-13)
    torch.testing.assert_close(matrix.t() @ matrix, torch.eye(size, dtype=torch.float64))


def test_a_large_transform_is_orthonormal_to_rounding() -> None:
    matrix = dct_matrix(2048, dtype=torch.float64)
    error = (matrix.t() @ matrix - torch.eye(2048, dtype=torch.float64)).abs().max()
    assert error < 1e-12


@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_sizes_that_are_none(size: Any) -> None:
    with pytest.raises(ValueError, match="size must be an int of at least 1"):
        dct_matrix(size)


class Training:
    """Steps of a head on rows that change, in float64, and its dense gradients."""

    def __init__(self, **arguments: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(V, H, generator=generator, dtype=torch.float64)
        self.generator = generator
        self.optimizer = DCTAdamW(self.weight, rank=RANK, **ADAM | arguments)
        self.transform = dct_matrix(H, dtype=torch.float64)

    def gradient(self) -> Tensor:
        """A backward through the basis, and the same gradient, dense, by plain torch."""
        generator = self.generator
        hidden = torch.randn(N, H, generator=generator, dtype=torch.float64)
        hidden *= torch.rand(H, generator=generator, dtype=torch.float64)
        target = torch.randint(V, (N,), generator=generator)
        basis = self.optimizer.basis
        linear_logprob(hidden, self.weight, target, weight_grad_basis=basis).logp.sum().backward()  # type: ignore[union-attr]
        dense = self.weight.clone().requires_grad_()
        picked = (hidden @ dense.t()).log_softmax(-1).gather(1, target[:, None])
        (found,) = torch.autograd.grad(picked.sum(), dense)
        return found

    def step(self) -> Tensor:
        dense = self.gradient()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return dense


def test_a_step_is_adamw_of_the_dense_gradient_projected() -> None:
    training = Training(update_every=1000)
    optimizer, start = training.optimizer, training.weight.clone()
    dense = training.step()  # in the lowest frequencies, and measured
    low = torch.zeros(V, RANK, dtype=torch.float64, requires_grad=True)
    low.grad = dense @ training.transform[:, :RANK]
    torch.optim.AdamW([low], weight_decay=0, **ADAM).step()
    moved = start + low.detach() @ training.transform[:, :RANK].t()
    torch.testing.assert_close(training.weight, moved, rtol=1e-6, atol=1e-6)
    best = (dense @ training.transform).square().sum(0).topk(RANK).indices.sort().values
    assert torch.equal(optimizer.columns, best) and optimizer.columns.tolist() != [0, 1, 2, 3]
    # From here on in one basis: of the columns that were there before, with what they had.
    columns, start = training.transform[:, best], training.weight.clone()
    fresh = [k for k, column in enumerate(best.tolist()) if column >= RANK]
    assert 0 < len(fresh) < RANK
    low = torch.zeros(V, len(fresh), dtype=torch.float64, requires_grad=True)
    adamw = torch.optim.AdamW([low], weight_decay=0, **ADAM)
    kept = [k for k in range(RANK) if k not in fresh]
    old = best[kept]
    second = torch.zeros(V, len(kept), dtype=torch.float64, requires_grad=True)
    second.grad = dense @ training.transform[:, old]
    both = torch.optim.AdamW([second], weight_decay=0, **ADAM)
    both.step()
    second.data.zero_()
    for _ in range(4):
        found = training.step() @ columns
        low.grad, second.grad = found[:, fresh], found[:, kept]
        adamw.step()
        both.step()
    moved = start + low.detach() @ columns[:, fresh].t() + second.detach() @ columns[:, kept].t()
    torch.testing.assert_close(training.weight, moved, rtol=1e-6, atol=1e-6)


def test_weight_decay() -> None:
    training = Training(weight_decay=0.5, lr=0.1)
    plain = Training(weight_decay=0.0, lr=0.1)
    start = training.weight.clone()
    training.step()
    plain.step()
    torch.testing.assert_close(training.weight, plain.weight - 0.1 * 0.5 * start)


def test_columns_are_chosen_every_so_often() -> None:
    training = Training(update_every=3)
    measured, changed = [], []
    for _ in range(7):
        before = training.optimizer.columns
        measured.append(training.optimizer.norms is not None)
        training.step()
        changed.append(not torch.equal(before, training.optimizer.columns))
    assert measured == [True, False, False, True, False, False, True]
    assert all(own <= due for own, due in zip(changed, measured, strict=True)) and changed[0]


def test_several_backwards_make_one_gradient() -> None:
    training = Training(update_every=1000)
    training.step()
    total = (training.gradient() + training.gradient()) @ training.optimizer._transform.double()
    wanted = total[:, training.optimizer.columns].float()
    torch.testing.assert_close(training.optimizer.gradient, wanted, rtol=1e-4, atol=1e-4)


def test_several_backwards_add_their_norms() -> None:
    training = Training()
    squares = [(training.gradient() @ training.transform).square().sum(0) for _ in range(2)]
    assert training.optimizer.norms is not None
    found = training.optimizer.norms.double()
    torch.testing.assert_close(found, squares[0] + squares[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [2, 3])
def test_state_goes_on_to_the_bit(dtype: torch.dtype, steps: int) -> None:
    """``steps`` before the state is saved: the next one measures, or does not."""

    def draw(weight: Tensor, optimizer: DCTAdamW, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(N, H, generator=generator, dtype=torch.float64).to(dtype)
        target = torch.randint(V, (N,), generator=generator)
        found = linear_logprob(hidden, weight, target, weight_grad_basis=optimizer.basis)
        found.logp.sum().backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()

    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype)
    optimizer = DCTAdamW(weight, rank=RANK, update_every=3, **ADAM)
    for seed in range(steps):
        draw(weight, optimizer, seed)
    saved, resumed = copy.deepcopy(optimizer.state_dict()), weight.clone()
    for seed in range(10, 15):
        draw(weight, optimizer, seed)
    other = DCTAdamW(resumed, rank=RANK, **ADAM)
    other.load_state_dict(saved)
    for seed in range(10, 15):
        draw(resumed, other, seed)
    assert torch.equal(weight, resumed)
    assert other.state[resumed]["exp_avg"].dtype == torch.float32
    with pytest.raises(ValueError, match=r"state_dict must be of .* \(203, 5\), got \(203, 4\)"):
        DCTAdamW(resumed, rank=RANK + 1).load_state_dict(saved)


def test_schedulers_take_it() -> None:
    training = Training()
    scheduler = torch.optim.lr_scheduler.StepLR(training.optimizer, 1, gamma=0.5)
    training.step()
    scheduler.step()
    before = training.weight.clone()
    training.optimizer.step()
    assert training.optimizer.param_groups[0]["lr"] == ADAM["lr"] / 2
    assert (training.weight - before).abs().max() < ADAM["lr"]


def test_slabs_of_the_weight_are_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = Training(), Training()
    whole.step()
    monkeypatch.setattr("fastpref.optim.adamw.SLAB_BYTES", 4 * H * 50)
    cut.step()
    torch.testing.assert_close(whole.weight, cut.weight)


def test_bad_use() -> None:
    weight = torch.zeros(V, H)
    for given, error, match in (
        ({"rank": 0}, ValueError, "rank must be an int of at least 1, got 0"),
        ({"rank": H + 1}, ValueError, "rank must be at most the hidden size, 16, got 17"),
        ({"rank": 2, "lr": -1.0}, ValueError, "lr must be a number of at least 0"),
        ({"rank": 2, "betas": (0.9, 1.0)}, ValueError, "betas must be two numbers"),
        ({"rank": 2, "update_every": 0}, ValueError, "update_every must be an int"),
        ({"rank": 2, "weight": weight[0]}, TypeError, r"weight must be one .*\(V, H\)"),
        ({"rank": 2, "weight": weight.clone().requires_grad_()}, ValueError, "requires_grad_"),
    ):
        with pytest.raises(error, match=match):
            DCTAdamW(**{"weight": weight} | given)
    assert isinstance(DCTAdamW(weight, rank=2).basis, WeightGradBasis)


@pytest.mark.heavy
def test_trains_to_the_loss_of_the_dense_gradient() -> None:
    """Rows of which three directions decide the next token: on a quarter of the columns, the held
    out loss is that of AdamW on the dense gradient, but for a twentieth of what that learns."""

    def draw(*shape: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator, dtype=torch.float32)

    vocab, steps = 64, 100
    teacher = draw(vocab, 3, seed=0) @ dct_matrix(H)[:, [2, 5, 11]].t()
    held = draw(1000, H, seed=1)

    def loss_of(weight: Tensor) -> float:
        known = (held @ teacher.t()).softmax(-1)
        return float(-(known * (held @ weight.detach().t()).log_softmax(-1)).sum(-1).mean())

    def trained(rank: int | None) -> float:
        weight = torch.zeros(vocab, H, dtype=torch.float32, requires_grad=rank is None)
        optimizer: torch.optim.Optimizer
        if rank is None:
            optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0)
        else:
            optimizer = DCTAdamW(weight, rank=rank, lr=0.1, update_every=20)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        for step in range(steps):
            hidden = draw(200, H, seed=100 + step)
            chances = (hidden @ teacher.t()).softmax(-1)
            generator = torch.Generator().manual_seed(step)
            target = torch.multinomial(chances, 1, generator=generator)[:, 0]
            basis = optimizer.basis if isinstance(optimizer, DCTAdamW) else None
            found = linear_logprob(hidden, weight, target, weight_grad_basis=basis)
            (-found.logp.mean()).backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
            decay.step()
        return loss_of(weight)

    start, dense, low = math.log(vocab), trained(None), trained(RANK)
    print(f"held out: {start:.3f} at first, {dense:.3f} dense, {low:.3f} on {RANK} of {H} columns")
    assert low <= dense + 0.05 * (start - dense)
    assert dense < start - 1


class Small(nn.Module):
    """A model whose body trains beside its head."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(vocab, width)
        self.body = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.body(self.embeddings(ids))[0]
        return hidden


@pytest.mark.heavy
@pytest.mark.parametrize("seed", [0, 1])
def test_a_small_model_trains_to_the_same_loss(seed: int) -> None:
    """DPO on pairs that count on and pairs that count back, all weights but the head's with AdamW:
    the loss on held-out pairs is that of a dense head, but for a twentieth of what that learns.
    AdamW moves each number by about its rate; at twice the rate a row of a quarter of the numbers
    goes as far."""
    vocab, width, steps, length = 60, 32, 120, 7

    def pairs(count: int, generator: torch.Generator) -> Tensor:
        start = torch.randint(vocab, (count, 1), generator=generator)
        ways = start + torch.arange(length), start - torch.arange(length)
        rows = torch.cat(ways) % vocab
        noise = torch.rand(rows.shape, generator=generator) < 0.2
        noise[:, 0] = False
        return torch.where(noise, torch.randint(vocab, rows.shape, generator=generator), rows)

    def loss_of(model: Small, ids: Tensor, ref_logps: Tensor, **given: Any) -> Tensor:
        hidden, weight = model(ids)[:, :-1], model.head.weight
        return preference_loss(
            hidden, weight, ids[:, 1:], "dpo", ref_logps=ref_logps, beta=0.2, **given
        ).loss

    def trained(rank: int | None) -> tuple[float, float]:
        torch.manual_seed(seed)
        model = Small(vocab, width)
        start = copy.deepcopy(model).requires_grad_(False)

        def ref_logps(ids: Tensor) -> Tensor:
            logp = linear_logprob(start(ids)[:, :-1], start.head.weight, ids[:, 1:]).logp
            assert logp is not None
            return logp.sum(1)

        weight = model.head.weight.requires_grad_(rank is None)
        body = [one for one in model.parameters() if one is not weight]
        optimizers = [torch.optim.AdamW(body, lr=2e-3, weight_decay=0)]
        head: Any = None
        if rank is None:
            optimizers.append(torch.optim.AdamW([weight], lr=2e-3, weight_decay=0))
        else:
            head = DCTAdamW(weight, rank=rank, lr=4e-3, update_every=20)
            optimizers.append(head)
        generator = torch.Generator().manual_seed(seed)
        held = pairs(200, generator)
        for _ in range(steps):
            ids = pairs(16, generator)
            given = {} if head is None else {"weight_grad_basis": head.basis}
            loss_of(model, ids, ref_logps(ids), **given).backward()
            for one in optimizers:
                one.step()
                one.zero_grad()
        with torch.no_grad():
            return tuple(float(loss_of(one, held, ref_logps(held))) for one in (start, model))  # type: ignore[return-value]

    (first, dense), (_, low) = trained(None), trained(8)
    print(f"held out: {first:.3f} at first, {dense:.3f} dense, {low:.3f} on 8 of 32 columns")
    assert first == pytest.approx(math.log(2)) and dense < 0.5 * first
    assert low <= dense + 0.05 * (first - dense)
