# SPDX-License-Identifier: Apache-2.0
"""``linear_logprob(restrict_to=...)`` against plain torch at float64, with every other logit of a
row at -inf."""

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from fastpref import ScoringOptions, explain, linear_logprob
from fastpref.scoring.chosen import rows as chosen_rows
from fastpref.scoring.statistics import OUTPUTS
from tests.scoring.cases import DTYPES
from tests.scoring.chosen_cases import MAP, Drawn, K, V, close

DIFFERENTIABLE = ("logp", "entropy", "lse", "mean_logits")


def draw(dtype=torch.float64, **map) -> Drawn:
    """Sets of one to K ids, some of them repeated; a target among them."""
    drawn = Drawn(dtype, **map)
    drawn.ids[..., 1] = drawn.ids[..., 3]
    drawn.ids[0, :3, 4:], drawn.ids[1, 1, 1:], drawn.ids[1, 2, :2] = -1, -7, -1
    drawn.target = drawn.ids[..., 3].clone()
    drawn.target[1, 1] = drawn.ids[1, 1, 0]
    return drawn


def plain(drawn: Drawn) -> dict[str, torch.Tensor]:
    """Each output, of the whole rows of logits."""
    members = torch.zeros(3, 5, V + 1, dtype=torch.bool)
    members.scatter_(-1, torch.where(drawn.ids < 0, V, drawn.ids).long(), True)
    members, logits = members[..., :V], drawn.logits()
    allowed = members & (logits > -torch.inf)
    own = drawn.target[..., None].clamp(0)
    logits = torch.where(members, logits, -torch.inf)
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    return {
        "logp": log_probs.gather(-1, own)[..., 0],
        "entropy": -(probs * torch.where(probs > 0, log_probs, 0)).sum(-1),
        "log_sum_sq_probs": (2 * log_probs).logsumexp(-1),
        "mean_logits": torch.where(allowed, logits, 0).sum(-1) / allowed.sum(-1),
        "is_top1": logits.gather(-1, own)[..., 0] == logits.amax(-1),
        "lse": logits.logsumexp(-1),
    }


def score(drawn: Drawn, **arguments):
    given = {"bias": drawn.bias, "outputs": OUTPUTS, **drawn.map, **arguments}
    return linear_logprob(
        drawn.hidden, drawn.weight, drawn.target, restrict_to=drawn.ids, **given
    )._asdict()


def loss(values, upstream):
    named = zip(DIFFERENTIABLE, upstream.unbind(-1), strict=False)
    return sum((values[name] * g).sum() for name, g in named)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("map", [{}, MAP], ids=["plain", "capped"])
def test_every_output_and_its_gradient(dtype, map):
    drawn = draw(dtype, **map)
    leaves = drawn.leaves()
    got, want = score(drawn), plain(drawn)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    for name in OUTPUTS:
        assert got[name].dtype == (torch.bool if name == "is_top1" else exact)
        assert got[name].requires_grad == (name in DIFFERENTIABLE)
        close([got[name]], [want[name]], exact)
    pairs = (torch.autograd.grad(loss(one, drawn.upstream), leaves) for one in (got, want))
    close(*pairs, dtype)


@pytest.mark.parametrize("name", OUTPUTS)
def test_only_what_was_asked_for(name):
    drawn = draw()
    got = score(drawn, outputs=(name,))
    assert [key for key, value in got.items() if value is not None] == [name]
    close([got[name].double()], [plain(drawn)[name].double()])


def test_a_set_of_all_ids_is_no_restriction():
    drawn = draw(**MAP)
    drawn.ids = torch.arange(V).expand(3, 5, V)
    whole = linear_logprob(
        drawn.hidden, drawn.weight, drawn.target, bias=drawn.bias, outputs=OUTPUTS, **MAP
    )
    for got, want in zip(score(drawn).values(), whole, strict=True):
        close([got.double()], [want.double()])


def test_a_target_outside_its_set_gives_nan_in_its_row_alone():
    drawn = draw()
    leaves = drawn.leaves()
    drawn.target[0, 0] = next(one for one in range(V) if one not in drawn.ids[0, 0])
    drawn.target[0, 1] = -1  # left out of the set
    drawn.ids[1, 0, 0] = V
    drawn.ids[2, 0] = -1
    bad = torch.zeros(3, 5, dtype=torch.bool)
    bad[0, 0] = bad[0, 1] = bad[1, 0] = bad[2, 0] = True
    got = score(drawn)
    for name, value in got.items():
        assert torch.equal(~value if name == "is_top1" else value.isnan(), bad) or name == "is_top1"
    assert not got["is_top1"][bad].any()
    # What the caller masks reaches nothing.
    found = torch.autograd.grad(got["logp"].masked_fill(bad, 0).sum(), leaves)
    assert all(one.isfinite().all() for one in found)
    assert not found[0][bad].any() and found[0][~bad].any()


def test_unscored_rows_are_not_read():
    drawn = draw(**MAP)
    clean = draw(**MAP)
    drawn.target[:, 2] = -100
    drawn.hidden[:, 2], drawn.ids[:, 2] = torch.nan, 10**15
    leaves, others = drawn.leaves(), clean.leaves()
    scored = drawn.target != -100
    got = score(drawn)
    assert all(not value[~scored].any() for value in got.values())
    want = plain(clean)
    upstream = drawn.upstream * scored[..., None]
    found = torch.autograd.grad(loss(got, upstream), leaves)
    close(found, torch.autograd.grad(loss(want, upstream), others))


def test_no_rows_are_gathered_for_unscored_tokens(monkeypatch):
    tokens = []
    gathered = chosen_rows.Chosen.gathered

    def counted(self, matrix, rows, columns):
        found = gathered(self, matrix, rows, columns)
        tokens.append(found.shape[0])
        return found

    monkeypatch.setattr(chosen_rows.Chosen, "gathered", counted)
    drawn = draw()
    drawn.target[:, 2:] = -100
    score(drawn)
    assert sum(tokens) == 6


def test_an_excluded_id_has_no_weight_and_as_a_target_minus_infinity():
    drawn = draw()
    drawn.bias[drawn.ids[0, 0, 0]] = drawn.bias[drawn.target[2, 2]] = -torch.inf
    leaves, got, want = drawn.leaves(), None, None
    got, want = score(drawn), plain(drawn)
    assert got["logp"][2, 2] == -torch.inf
    for name in OUTPUTS:
        close([got[name].double()], [want[name].double()])
    finite = want["logp"].isfinite()
    upstream = drawn.upstream * finite[..., None]
    found = torch.autograd.grad(loss(got, upstream)[None].nansum(), leaves)
    assert all(one.isfinite().all() for one in found)


@pytest.mark.parametrize("budget", [1, 500])
def test_within_a_budget(budget):
    drawn = draw()
    options = ScoringOptions(memory_budget=budget, max_scored=15)
    close([score(drawn, options=options)["logp"]], [plain(drawn)["logp"]])


class Sizes(TorchDispatchMode):
    """The largest tensor that any operator makes, in elements."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_no_row_of_logits_is_formed():
    vocab, tokens, width = 4000, 20, 3
    hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(vocab, width)
    ids = torch.randint(vocab, (tokens, K))
    with Sizes() as sizes:
        linear_logprob(hidden, weight, ids[:, 0], restrict_to=ids).logp.sum().backward()
    assert 0 < sizes.largest <= tokens * K * width


def test_an_update_of_the_head():
    drawn = draw()
    a, b = torch.randn(2, drawn.hidden.shape[-1]).double(), torch.randn(V, 2).double()
    got = score(drawn, lora=(a, b, 0.3))["logp"]
    drawn.weight = drawn.weight + 0.3 * b @ a
    close([got], [plain(drawn)["logp"]])


def test_under_autocast():
    drawn = draw(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = score(drawn)["logp"]
    drawn.hidden, drawn.weight = drawn.hidden.bfloat16(), drawn.weight.bfloat16()
    close([got], [score(drawn)["logp"]], torch.float32)


@pytest.mark.slow
@pytest.mark.heavy
def test_compiled():
    torch._dynamo.reset()
    compiled = torch.compile(score, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 2):
        drawn = draw(**MAP)
        drawn.target[:, 1] = -100
        for name in ("hidden", "ids", "target", "upstream"):
            setattr(drawn, name, getattr(drawn, name)[:rows].contiguous())
        leaves = drawn.leaves()
        got, want = compiled(drawn), score(drawn)
        close([got[name].double() for name in OUTPUTS], [want[name].double() for name in OUTPUTS])
        pairs = (torch.autograd.grad(loss(one, drawn.upstream), leaves) for one in (got, want))
        close(*pairs)


def on_a_rank(rank):
    drawn, cut = draw(**MAP), 20
    drawn.leaves()
    part = slice(cut) if rank == 0 else slice(cut, None)
    drawn.weight, drawn.bias = drawn.weight[part], drawn.bias[part]
    leaves = drawn.leaves()
    got = score(drawn, tp_group=dist.group.WORLD)
    found = torch.autograd.grad(loss(got, drawn.upstream), leaves)
    return [*(got[name].detach().double() for name in OUTPUTS), *found]


@pytest.mark.heavy
def test_a_sharded_head(two_ranks):
    first, second = two_ranks(on_a_rank)
    drawn = draw(**MAP)
    leaves = drawn.leaves()
    got = score(drawn)
    d_hidden, d_weight, d_bias = torch.autograd.grad(loss(got, drawn.upstream), leaves)
    values = [got[name].double() for name in OUTPUTS]
    for rank in (first, second):
        close(rank[:-2], [*values, d_hidden])
    close(
        [torch.cat(both) for both in zip(first[-2:], second[-2:], strict=True)], [d_weight, d_bias]
    )


def test_errors():
    drawn = draw()
    with pytest.raises(TypeError, match="restrict_to must be int64"):
        linear_logprob(drawn.hidden, drawn.weight, drawn.target, restrict_to=drawn.ids.float())
    with pytest.raises(ValueError, match=r"restrict_to must be \(\.\.\., K\)"):
        linear_logprob(drawn.hidden, drawn.weight, drawn.target, restrict_to=drawn.target)
    with pytest.raises(ValueError, match="restrict_to has no schedule"):
        explain(drawn.hidden, drawn.weight, drawn.target, restrict_to=drawn.ids)
