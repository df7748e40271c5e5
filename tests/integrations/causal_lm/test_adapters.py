# SPDX-License-Identifier: Apache-2.0
"""PEFT's models: adapters on the output head, its trained copies, trained tokens, and prompts; each
with the gradients of full logits."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastpref
from tests.integrations.causal_lm.models import (
    LENGTH,
    batch,
    check_call,
    check_gradients,
    gradients,
    make,
    refusals,
    scores_of,
)

peft = pytest.importorskip("peft", reason="peft is not installed (extra: fastpref[trl])")

RANK, PROMPT = 4, 3


def lora(**given: Any) -> Any:
    return peft.LoraConfig(**{"target_modules": ["q_proj", "lm_head"], "r": RANK, **given})


def adapted(model: Any, config: Any) -> Any:
    """With adapters that are not zero."""
    wrapped = peft.get_peft_model(model, config)
    return stirred(wrapped)


def stirred(wrapped: Any) -> Any:
    for name, value in wrapped.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(value, std=0.2)
    return wrapped


CAPPED = {"final_logit_softcapping": 2.0, "tie_word_embeddings": False}
TIED = {"tie_word_embeddings": True}
ATTENTION = {"target_modules": ["q_proj"]}
SAVED = {**ATTENTION, "modules_to_save": ["lm_head"]}


@pytest.mark.parametrize(
    ("architecture", "fields", "config"),
    [
        ("llama", {}, {}),
        ("llama", {}, {"use_rslora": True}),
        ("gemma2", CAPPED, {}),
        ("phi", {}, {}),
        ("phi", {}, {"lora_bias": True}),
        ("llama", {}, {"use_dora": True}),
        ("phi", {}, {"use_dora": True}),
        ("llama", {}, SAVED),
        ("llama", TIED, ATTENTION),
        ("llama", TIED, {}),
        ("llama", TIED, {"use_dora": True}),
        ("llama", TIED, SAVED),
        ("llama", TIED, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
        ("llama", TIED, {**SAVED, "ensure_weight_tying": True}),
        ("llama", TIED, {**ATTENTION, "trainable_token_indices": [70, 71]}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
@pytest.mark.parametrize("first", ["fused first", "adapted first"])
def test_as_full_logits(
    architecture: str, fields: dict[str, Any], config: dict[str, Any], first: str
) -> None:
    model = make(architecture, **fields)
    if first == "fused first":
        fastpref.fuse_lm_head(model)
    wrapped = adapted(model, lora(**config))
    assert fastpref.fuse_lm_head(wrapped) is wrapped
    check_call(wrapped, batch())
    assert refusals(wrapped) == ()


def test_several_adapters_some_of_them_active() -> None:
    wrapped = peft.get_peft_model(make(), lora(lora_alpha=3))
    wrapped.add_adapter("second", lora(r=3, lora_alpha=5))
    wrapped.add_adapter("third", lora(r=2))
    stirred(wrapped)
    fastpref.fuse_lm_head(wrapped)
    inputs = batch()
    seen = []
    for active in (["default"], ["default", "second"], ["second", "third"]):
        wrapped.base_model.set_adapter(active)
        seen.append(check_call(wrapped, inputs).loss.item())
    assert len(set(seen)) == 3 and refusals(wrapped) == ()


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, SAVED])
@pytest.mark.parametrize("fields", [{}, TIED], ids=["", "tied"])
def test_disabled_and_merged_adapters(config: dict[str, Any], fields: dict[str, Any]) -> None:
    """As a reference model, and after training."""
    wrapped = fastpref.fuse_lm_head(adapted(make(**fields), lora(**config)))
    if "modules_to_save" in config:
        torch.nn.init.normal_(wrapped.get_base_model().lm_head.weight, std=0.3)
    inputs = batch()

    def scored() -> Tensor:
        expected = scores_of(wrapped(**inputs).logits, inputs["labels"])["log_probs"]
        found: Tensor = wrapped(**inputs, fused_lm_head=True).log_probs
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        return found

    with torch.no_grad():
        active = scored()
        with wrapped.disable_adapter():
            disabled = scored()
        assert (disabled - active).abs().max() > 0.1
        wrapped.merge_adapter()
        merged = scored()
        # Into the embedding too, where it is tied: another model, of which PEFT takes it back
        # within the next forward.
        if not fields:
            torch.testing.assert_close(merged, active, rtol=1e-4, atol=1e-4)
            with wrapped.disable_adapter():
                torch.testing.assert_close(scored(), disabled, rtol=1e-4, atol=1e-4)
    assert refusals(wrapped) == ()


def test_dropout_of_the_head_alone_is_exact_where_it_drops_nothing() -> None:
    wrapped = fastpref.fuse_lm_head(adapted(make(), lora(lora_dropout=0.5))).eval()
    check_call(wrapped, batch())
    assert refusals(wrapped) == ()


@pytest.mark.parametrize("architecture", ["llama", "phi"])
def test_dropout_drops_the_update_alone(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mask by position, that full logits and the fused head can have in common."""
    mask = 2.0 * (torch.rand(LENGTH, 32) < 0.5)

    def drop(module: Any, rows: Tensor) -> Tensor:
        return rows * mask[: rows.shape[1]] if module.training else rows

    monkeypatch.setattr(torch.nn.Dropout, "forward", drop)
    wrapped = adapted(make(architecture), lora(target_modules=["lm_head"], lora_dropout=0.5))
    fastpref.fuse_lm_head(wrapped)
    output = check_call(wrapped, batch())
    assert refusals(wrapped) == ()
    wrapped.eval()
    assert (wrapped(**batch(), fused_lm_head=True).log_probs - output.log_probs).abs().max() > 0.1


def test_a_trained_head_beside_its_adapter() -> None:
    wrapped = fastpref.fuse_lm_head(adapted(make(), lora()))
    wrapped.requires_grad_(True)
    check_call(wrapped, batch())
    assert refusals(wrapped) == ()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (lora(use_dora=True, lora_dropout=0.5), "DoRA with dropout; set lora_dropout=0"),
        (peft.IA3Config(target_modules=["q_proj", "lm_head"], feedforward_modules=[]), "no LoRA"),
    ],
    ids=["DoRA with dropout", "IA3"],
)
def test_what_is_not_read_is_scored_from_logits(
    config: Any, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With one warning, however many calls."""
    wrapped = fastpref.fuse_lm_head(adapted(make(), config))
    inputs = batch()
    for _ in range(2):
        torch.manual_seed(1)
        plain = wrapped(**inputs)
        wanted = gradients(plain.loss, wrapped)
        torch.manual_seed(1)
        output = wrapped(**inputs, fused_lm_head=True)
        torch.testing.assert_close(output.loss, plain.loss)
        check_gradients(gradients(output.loss, wrapped), wanted)
    (record,) = [one for one in caplog.records if one.name == "fastpref"]
    assert said in record.getMessage() and "LlamaForCausalLM" in record.getMessage()
    assert "full logits" in record.getMessage()


def test_adapters_mixed_in_a_batch_are_refused() -> None:
    wrapped = fastpref.fuse_lm_head(adapted(make(), lora())).eval()
    inputs = batch()
    wrapped(**inputs, fused_lm_head=True)
    with pytest.raises(ValueError, match=r"called with adapter_names too.*one set of adapters"):
        wrapped(**inputs, adapter_names=["default", "__base__"], fused_lm_head=True)


@pytest.mark.parametrize("fields", [{}, TIED], ids=["", "tied"])
@pytest.mark.parametrize(
    "kind", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"]
)
def test_prompts(kind: str, fields: dict[str, Any]) -> None:
    """PEFT lengthens ``labels`` by the positions of a prompt, and does not see ``fused_labels``."""
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT)
    wrapped = fastpref.fuse_lm_head(peft.get_peft_model(make(**fields), config))
    inputs = batch()
    plain = wrapped(**inputs)
    longer = plain.logits.shape[1] - LENGTH
    assert longer == (0 if kind == "PrefixTuningConfig" else PROMPT)
    expected = scores_of(plain.logits[:, longer:], inputs["labels"])["log_probs"]
    wanted = gradients(plain.loss, wrapped)
    output = wrapped(**inputs, fused_lm_head=True)
    torch.testing.assert_close(
        output.log_probs[:, longer:].double(), expected, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(output.loss, plain.loss)
    check_gradients(gradients(output.loss, wrapped), wanted)
    labels = inputs.pop("labels")
    output = wrapped(**inputs, fused_labels=labels, fused_lm_head=True)
    torch.testing.assert_close(output.log_probs.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.loss, plain.loss)
    assert refusals(wrapped) == ()


class Work(TorchDispatchMode):
    """The products with a vocabulary, in those of so many rows with all of its head."""

    def __init__(self, rows: int, head: nn.Linear) -> None:
        super().__init__()
        self.vocabulary, self.unit = head.out_features, rows * head.weight.numel()
        self.done = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            (rows, inner), (_, columns) = (one.shape for one in args[-2:])
            if self.vocabulary in (rows, inner, columns):
                self.done += rows * inner * columns / self.unit
        return func(*args, **(kwargs or {}))


def test_a_reference_without_its_adapter_costs_one_product_more() -> None:
    """Beside the two of the policy under a head that is frozen. To score rows of both at once
    spares none, and in one call adds the reference's second, which nothing asks for."""
    wrapped = fastpref.fuse_lm_head(adapted(make(), lora(**ATTENTION)))
    inputs = batch()
    wrapped(**inputs, fused_lm_head=True)  # measured
    head, scored = wrapped.get_base_model().lm_head, int((inputs["labels"][:, 1:] != -100).sum())
    given: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: given.append(args[0].detach()))
    with Work(scored, head) as policy:
        output = wrapped(**inputs, fused_lm_head=True)
        output.loss.backward()
    with Work(scored, head) as reference, torch.no_grad(), wrapped.disable_adapter():
        ref_log_probs = wrapped(**inputs, fused_lm_head=True).log_probs
    handle.remove()
    assert (policy.done, reference.done) == (2, 1)
    hidden = [one[:, :-1] for one in given]
    both = torch.cat(hidden).requires_grad_()
    target = inputs["labels"][:, 1:].repeat(2, 1)
    with Work(scored, head) as stacked:
        logp = fastpref.linear_logprob(both, head.weight, target).logp
        found, ref_found = logp.chunk(2)
        (found - ref_found.detach()).sum().backward()
    assert stacked.done == 4
    torch.testing.assert_close(found, output.log_probs)
    torch.testing.assert_close(ref_found, ref_log_probs)
    leaf = hidden[0].requires_grad_()
    with Work(scored, head) as together:
        target = inputs["labels"][:, 1:]
        call = fastpref.preference_loss(leaf, head.weight, target, "dpo", ref_hidden=hidden[1])
        call.loss.backward()
    assert together.done == 3


def test_unfusing_reaches_through() -> None:
    wrapped = fastpref.fuse_lm_head(adapted(make(), lora()))
    assert fastpref.unfuse_lm_head(wrapped) is wrapped
    assert "forward" not in vars(wrapped.get_base_model())
