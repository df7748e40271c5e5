# SPDX-License-Identifier: Apache-2.0
"""The GRPO module against Liger-Kernel's, against plain torch where that is wrong, and on two
ranks."""

import pytest
import torch
import torch.distributed as dist

from fastpref import linear_logprob
from fastpref.nn import FusedLinearGRPOLoss
from fastpref.nn.grpo import LOSS_TYPES
from tests.nn.peers import B, T, assert_same_signatures, close, compare, gradients, leaves, tensors

NAME = "FusedLinearGRPOLoss"
GENERATOR = torch.Generator().manual_seed(11)
ADVANTAGES = torch.randn(B, generator=GENERATOR)
NOISE, REF_NOISE = torch.randn(2, B, T, generator=GENERATOR) / 3
RATIOS = 0.6 + torch.rand(B, T, generator=GENERATOR) * 0.8
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
SETTINGS = {"dr_grpo": {"max_completion_length": 9}, "cispo": {"epsilon_high": 1.1}}


def batch(reference="logps", masked=True, old=True):
    """float32, as the products of Liger-Kernel are; old log-probs near those of the policy."""
    every = tensors(torch.float32, masked=masked)
    mask = every["target"] != -100
    ids = torch.where(mask, every["target"], 5)
    given = {name: every[name] for name in ("_input", "lin_weight", "bias")}
    logp = linear_logprob(every["_input"], every["lin_weight"], ids, bias=every["bias"]).logp
    given |= {"selected_token_ids": ids, "attention_mask": mask.long(), "advantages": ADVANTAGES}
    if old:
        given["old_per_token_logps"] = logp + NOISE
    if reference == "logps":
        given["ref_per_token_logps"] = logp + REF_NOISE
    if reference == "hidden":
        given |= {name: every[name] for name in ("ref_input", "ref_weight", "ref_bias")}
    return given


def settings_of(loss_type, **more):
    return {"loss_type": loss_type, **SETTINGS.get(loss_type, {}), **more}


def test_signatures():
    assert_same_signatures(NAME, unlike={"epsilon_high"})


def test_the_bound_of_cispo_is_of_the_ratio():
    """5 where none is given, and 0.2 for the others; what is given counts, 0.2 too."""
    given = batch()
    for loss_type in LOSS_TYPES:
        settings = {k: v for k, v in settings_of(loss_type).items() if k != "epsilon_high"}
        bound = 5.0 if loss_type == "cispo" else 0.2
        module = FusedLinearGRPOLoss(**settings)
        loss = module(**given)[0]
        assert torch.equal(loss, FusedLinearGRPOLoss(**settings, epsilon_high=bound)(**given)[0])
    compare(NAME, given, {"loss_type": "cispo", "epsilon_high": 0.2})
    module = FusedLinearGRPOLoss(**SETTINGS["dr_grpo"])
    module.loss_type = "cispo"
    assert torch.equal(module(**given)[0], FusedLinearGRPOLoss(loss_type="cispo")(**given)[0])


def unpadded(loss_type, **how):
    """Liger-Kernel adds padding to the loss of luspo wherever a term has one value a token."""
    return batch(masked=loss_type != "luspo", **how)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("old", [False, True], ids=["on-policy", "off-policy"])
def test_every_loss_type(loss_type, beta, old):
    given = unpadded(loss_type, old=old)
    compare(NAME, given, settings_of(loss_type, beta=beta))


@pytest.mark.parametrize("loss_type", CLIPPED)
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_one_ratio_a_response(loss_type, beta):
    given = batch(masked=loss_type != "luspo" or beta == 0)
    more = {"importance_sampling_level": "sequence", "epsilon_low": 0.02, "epsilon_high": 0.04}
    compare(NAME, given, settings_of(loss_type, beta=beta, **more))


@pytest.mark.parametrize("loss_type", CLIPPED)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_delta(loss_type, level):
    settings = settings_of(loss_type, importance_sampling_level=level, delta=1.05)
    loss, _ = compare(NAME, unpadded(loss_type), settings)
    unbounded = FusedLinearGRPOLoss(**settings | {"delta": None})
    assert loss != unbounded(**unpadded(loss_type))[0]


@pytest.mark.parametrize(
    ("loss_type", "level"),
    [(one, "token") for one in LOSS_TYPES] + [(one, "sequence") for one in CLIPPED],
)
def test_corrected_divergence(loss_type, level):
    more = {"use_bias_correction_kl": True, "importance_sampling_level": level, "beta": 0.5}
    compare(NAME, unpadded(loss_type), settings_of(loss_type, **more))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("shape", [(B,), (B, 1), (B, T)], ids=["rows", "column", "tokens"])
def test_correction_for_the_sampler(loss_type, shape):
    given = unpadded(loss_type)
    ratios = RATIOS if shape == (B, T) else RATIOS[:, 0].reshape(shape)
    if shape == (B, T):  # Liger-Kernel reads padding too in vespo
        ratios = torch.where(given["attention_mask"] != 0, ratios, 1.0)
    compare(NAME, given | {"vllm_is_ratio": ratios}, settings_of(loss_type))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("number", [40, torch.tensor(40), 0], ids=["int", "tensor", "none"])
def test_tokens_of_several_batches(loss_type, number):
    given = unpadded(loss_type) | {"num_items_in_batch": number}
    compare(NAME, given, settings_of(loss_type))


@pytest.mark.parametrize(
    "settings",
    [
        {"sapo_temperature_pos": 2.0, "sapo_temperature_neg": 3.0, "loss_type": "sapo"},
        {"vespo_k_pos": 1.5, "vespo_lambda_pos": 2.5, "loss_type": "vespo"},
        {"vespo_k_neg": 1.5, "vespo_lambda_neg": 1.2, "loss_type": "vespo"},
        {"epsilon_low": 0.1, "epsilon_high": 0.05, "loss_type": "dapo"},
        {"temperature": 0.7},
        {"beta": 0.0, "use_ref_model": False},
        {"use_ref_model": False},
    ],
)
def test_settings(settings):
    reference = "logps" if settings.get("use_ref_model", True) else None
    compare(NAME, batch(reference), settings)


def test_a_live_reference():
    given = batch("hidden")
    compare(NAME, given, {"beta": 0.3, "temperature": 0.7})
    with pytest.warns(UserWarning, match="Using ref_per_token_logps") as warned:
        loss, _ = FusedLinearGRPOLoss(beta=0.3)(**given | {"ref_per_token_logps": NOISE - 3})
    without = {name: one for name, one in given.items() if not name.startswith("ref_")}
    expected, _ = FusedLinearGRPOLoss(beta=0.3)(**without, ref_per_token_logps=NOISE - 3)
    assert torch.equal(loss, expected)  # what is given is not computed
    assert [one.filename for one in warned] == [__file__]


def test_a_reference_without_weight_is_not_scored():
    given = batch("hidden")
    given["ref_input"] = torch.full_like(given["ref_input"], torch.nan)
    loss, returned = FusedLinearGRPOLoss(beta=0.0)(**given)
    assert torch.isfinite(loss) and len(returned) == 1
    assert torch.isfinite(FusedLinearGRPOLoss(beta=0.0)(**batch(None))[0])


@pytest.mark.parametrize("loss_type", sorted(set(LOSS_TYPES) - set(CLIPPED)))
def test_one_ratio_a_response_is_refused_when_called(loss_type):
    """Code that constructs such a loss with Liger-Kernel goes on until then."""
    module, given = FusedLinearGRPOLoss(**settings_of(loss_type)), batch()
    module.importance_sampling_level = "sequence"
    settings = settings_of(loss_type, importance_sampling_level="sequence")
    for one in (FusedLinearGRPOLoss(**settings), module):
        with pytest.raises(ValueError, match="Sequence-level importance sampling is not supported"):
            one(**given)
    module.importance_sampling_level = "token"
    assert module(**given)[0].isfinite()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_padding_is_no_part_of_luspo(level):
    given = leaves(batch())
    settings = {"importance_sampling_level": level, "epsilon_low": 0.2, "epsilon_high": 0.2}
    loss, _ = FusedLinearGRPOLoss(loss_type="luspo", beta=0.3, **settings)(**given)
    mask = given["attention_mask"] != 0
    logits = given["_input"] @ given["lin_weight"].t() + given["bias"]
    logp = logits.log_softmax(-1).gather(-1, given["selected_token_ids"][..., None])[..., 0]
    log_ratio = torch.where(mask, logp - given["old_per_token_logps"], 0)
    if level == "sequence":
        log_ratio = (log_ratio.sum(-1) / mask.sum(-1))[:, None].expand(B, T)
    ratio, advantages = log_ratio.exp(), ADVANTAGES[:, None]
    away = given["ref_per_token_logps"] - logp
    kl = away.exp() - away - 1
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    expected = ((0.3 * kl - surrogate) * mask).sum(-1).mean()
    close((loss, gradients(loss, given)), (expected, gradients(expected, given)))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_padding_is_not_read(loss_type):
    given = batch("logps") | {"vllm_is_ratio": RATIOS}
    module = FusedLinearGRPOLoss(**settings_of(loss_type))
    expected, metrics = module(**given)
    hidden = given["attention_mask"] == 0
    spoilt = {
        name: given[name].masked_fill(hidden, torch.nan)
        for name in ("old_per_token_logps", "ref_per_token_logps", "vllm_is_ratio")
    }
    spoilt["_input"] = given["_input"].masked_fill(hidden[..., None], torch.nan)
    loss, spoilt_metrics = module(**given | spoilt)
    assert torch.equal(loss, expected) and torch.equal(
        torch.stack(metrics), torch.stack(spoilt_metrics)
    )


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_completions_without_tokens(loss_type):
    given = batch()
    given["attention_mask"][1] = 0
    loss, _ = FusedLinearGRPOLoss(**settings_of(loss_type))(**given)
    assert torch.isfinite(loss)
    given["attention_mask"] = torch.zeros(B, T)
    given = leaves(given)
    loss, returned = FusedLinearGRPOLoss(**settings_of(loss_type))(**given)
    assert loss == 0 and all(one == 0 for one in returned)
    assert all((one == 0).all() for one in gradients(loss, given))


def test_settings_may_change_later():
    module, given = FusedLinearGRPOLoss(), batch()
    module.loss_type, module.epsilon_high = "cispo", 1.1
    expected, _ = FusedLinearGRPOLoss(loss_type="cispo", epsilon_high=1.1)(**given)
    assert torch.equal(module(**given)[0], expected)


CASES = {
    "unknown loss": (
        {"loss_type": "ppo"},
        {},
        "Unknown loss type: loss_type must be one of grpo, .* got 'ppo'",
    ),
    "near loss": ({"loss_type": "dr-grpo"}, {}, "got 'dr-grpo'; did you mean 'dr_grpo'"),
    "unknown level": (
        {"importance_sampling_level": "batch"},
        {},
        "importance_sampling_level must be one of 'token', 'sequence', got 'batch'",
    ),
    "one ratio of cispo": (
        {"loss_type": "cispo", "importance_sampling_level": "sequence"},
        {},
        "Sequence-level importance sampling is not supported .*'cispo': .* got 'sequence'",
    ),
    "delta of sapo": ({"loss_type": "sapo", "delta": 2.0}, {}, "delta is no part of .* got 2.0"),
    "no length": (
        {"loss_type": "dr_grpo"},
        {},
        "max_completion_length must be provided for loss_type 'dr_grpo', .* got None",
    ),
    "negative delta": ({"delta": -1.0}, {}, r"delta must be positive, got -1\.0"),
    "no temperature": (
        {"loss_type": "sapo", "sapo_temperature_neg": 0.0},
        {},
        r"sapo_temperature_neg must be positive, got 0\.0",
    ),
    "no reference": ({}, {"ref_per_token_logps": None}, "pass ref_per_token_logps or ref_input"),
    "mask of another shape": (
        {},
        {"attention_mask": torch.ones(B, 1)},
        r"attention_mask must be \(6, 5\), got \(6, 1\)",
    ),
    "advantages by token": (
        {},
        {"advantages": torch.zeros(B, T)},
        r"advantages must be \(6,\), got \(6, 5\)",
    ),
    "ratios of another shape": (
        {},
        {"vllm_is_ratio": torch.ones(T)},
        r"vllm_is_ratio must be \(6,\) or \(6, 1\) or \(6, 5\), got \(5,\)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_errors(case):
    settings, changes, message = CASES[case]
    with pytest.raises(ValueError, match=message):
        FusedLinearGRPOLoss(**settings)(**batch() | changes)


def rank_losses(rows):
    """Of these rows: the losses, and the gradients, averaged over ranks where there are several."""
    given = batch()
    by_row = {name for name, one in given.items() if len(one) == B}
    part = leaves({name: one[rows] if name in by_row else one for name, one in given.items()})
    found = {}
    for loss_type in ("dapo", "cispo", "vespo"):
        for number in (None, 40):
            module = FusedLinearGRPOLoss(loss_type=loss_type, epsilon_high=1.1)
            loss, _ = module(**part, num_items_in_batch=number)
            values = torch.cat([loss.detach()[None], gradients(loss, part)[1].flatten()])
            if dist.is_initialized():
                dist.all_reduce(values)
                values /= dist.get_world_size()
            found[loss_type, number] = values
    return found


def unequal_parts(rank):
    return rank_losses(slice(0, 2) if rank == 0 else slice(2, B))


@pytest.mark.heavy
def test_two_ranks_are_one_batch(two_ranks):
    whole = rank_losses(slice(None))
    for found in two_ranks(unequal_parts):
        for case, values in whole.items():
            close(found[case], values)
