# SPDX-License-Identifier: Apache-2.0
"""``fuse_lm_head`` and back: what it leaves alone, copies, what it refuses, and what it measures
at the first call."""

import copy
import functools
import inspect
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpref
from fastpref.integrations.causal_lm import measurement
from fastpref.integrations.causal_lm.fuse import STATE
from tests.integrations.causal_lm.models import (
    batch,
    check_call,
    gradients,
    make,
    refusals,
    scores_of,
    with_likeliest,
)


@pytest.mark.heavy
def test_import_needs_no_transformers() -> None:
    """Neither that of the package nor of the functions."""
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['peft'] = None\n"
        "import fastpref; assert 'fastpref.integrations' not in sys.modules\n"
        "fuse = fastpref.fuse_lm_head\n"
        "try: fuse(None)\n"
        "except ImportError as error: assert 'pip install' in str(error)\n"
        "else: raise SystemExit('not raised')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_calls_without_the_keyword_are_the_models_own() -> None:
    model, inputs = make(), batch()
    before = model(**inputs)
    signature = inspect.signature(model.forward)
    assert fastpref.fuse_lm_head(model) is model
    assert inspect.signature(model.forward) == signature
    for _ in range(2):
        after = model(**inputs)
        assert type(after) is type(before)
        assert torch.equal(after.logits, before.logits) and torch.equal(after.loss, before.loss)
        model(**inputs, fused_lm_head=True)
    assert "forward" not in vars(model.get_output_embeddings())
    assert not model.get_output_embeddings()._forward_hooks


def test_fusing_twice_and_unfusing() -> None:
    model, inputs = make(), batch()
    assert fastpref.unfuse_lm_head(model) is model
    fastpref.fuse_lm_head(model)
    model(**inputs, fused_lm_head=True)
    state = getattr(model, STATE)
    fastpref.fuse_lm_head(model, check=False)
    assert getattr(model, STATE) is state and state.measured is not None
    fastpref.unfuse_lm_head(model)
    assert "forward" not in vars(model) and not hasattr(model, STATE)


def test_a_forward_of_the_instance_is_kept() -> None:
    model, inputs = make(), batch()
    called = []
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        called.append(None)
        return own(*args, **kwargs)

    model.forward = forward
    fastpref.fuse_lm_head(model)
    model(**inputs, fused_lm_head=True)
    assert called
    fastpref.unfuse_lm_head(model)
    assert model.forward is forward


def test_unfusing_beneath_another_forward_is_refused() -> None:
    model = fastpref.fuse_lm_head(make())
    fused = model.forward
    model.forward = functools.wraps(fused)(lambda *args, **kwargs: fused(*args, **kwargs))
    with pytest.raises(
        RuntimeError, match=r"LlamaForCausalLM was replaced after fuse_lm_head.*fir"
    ):
        fastpref.unfuse_lm_head(model)
    assert hasattr(model, STATE)


@pytest.mark.parametrize("called", [False, True])
def test_a_deep_copy_is_fused_by_itself(called: bool) -> None:
    model, inputs = fastpref.fuse_lm_head(make()), batch()
    if called:
        model(**inputs, fused_lm_head=True)
    other = copy.deepcopy(model)
    assert other.forward.__self__ is other
    with torch.no_grad():
        for value in other.parameters():
            value.mul_(1.5)
    mine, theirs = (one(**inputs, fused_lm_head=True) for one in (model, other))
    for one, output in ((model, mine), (other, theirs)):
        expected = scores_of(one(**inputs).logits, inputs["labels"])["log_probs"]
        torch.testing.assert_close(output.log_probs.double(), expected, rtol=1e-5, atol=1e-5)
    assert (mine.log_probs - theirs.log_probs).abs().max() > 0.1
    assert gradients(theirs.loss, other) and all(one.grad is None for one in model.parameters())
    fastpref.unfuse_lm_head(other)
    assert hasattr(model, STATE)


def test_save_and_load(tmp_path: Path) -> None:
    model, inputs = fastpref.fuse_lm_head(make("qwen2", tie_word_embeddings=True)), batch()
    output = model(**inputs, fused_lm_head=True)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.config.architectures == ["Qwen2ForCausalLM"]
    assert not hasattr(loaded, STATE)
    found = fastpref.fuse_lm_head(loaded.train())(**inputs, fused_lm_head=True)
    torch.testing.assert_close(found.log_probs, output.log_probs)


def test_generate() -> None:
    model = make().eval()
    ids = batch()["input_ids"]
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    fastpref.fuse_lm_head(model)
    assert torch.equal(model.generate(ids, **settings), expected)
    with pytest.raises(ValueError, match="nonsense"):  # judged by the signature
        model.generate(ids, nonsense=1, **settings)


def test_gradient_checkpointing() -> None:
    model = make()
    model.gradient_checkpointing_enable()
    check_call(fastpref.fuse_lm_head(model), batch())
    assert refusals(model) == ()


def test_measuring_leaves_random_numbers_and_modes_alone() -> None:
    from transformers import AutoModelForCausalLM

    config = make("gpt2").config
    config.attn_pdrop = config.resid_pdrop = config.embd_pdrop = 0.3
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    inputs = batch()
    fastpref.fuse_lm_head(model)
    seen = []
    # Some draw in eval mode too.
    model.transformer.register_forward_hook(
        lambda module, *args: seen.append((module.training, torch.rand(1)))
    )
    outputs = []
    for _ in range(2):  # the first measures
        torch.manual_seed(3)
        outputs.append(model(**inputs, fused_lm_head=True).log_probs)
        outputs.append(torch.rand(3))
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
    assert [training for training, _ in seen] == [False, False, True, True]
    assert [module.training for module in model.modules()] == modes
    assert all(value.grad is None for value in model.parameters())


def test_the_pages_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(fastpref.__file__).parent / "integrations" / "causal_lm" / "README.md"
    section = page.read_text(encoding="utf-8")
    scope: dict[str, Any] = {}
    exec(section.split("```python")[1].split("```")[0], scope)
    assert "torch.Size([4, 31])" in capsys.readouterr().out
    model, output, ids = scope["model"], scope["output"], scope["ids"]
    torch.testing.assert_close(output.loss, model(input_ids=ids, labels=ids).loss)
    assert refusals(model) == () and model.lm_head.weight.grad is not None


def test_measuring_leaves_autocasts_casts_alone() -> None:
    """Those of a run without gradient have none."""
    model = fastpref.fuse_lm_head(make())
    kept = []
    model.model.norm.register_forward_hook(
        lambda *args: kept.append((torch.is_grad_enabled(), torch.is_autocast_cache_enabled()))
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch(), fused_lm_head=True)
    assert kept == [(False, False), (False, False), (True, True)]
    assert len(gradients(output.loss, model)) == len(list(model.parameters()))


def test_a_loss_that_needs_no_head_with_labels() -> None:
    """As fused losses of others have it; without labels the head is called."""
    model, inputs = make(), batch()
    own = model.forward

    def forward(*args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if labels is not None:
            hidden = model.model(*args, **kwargs)[0]
            return types.SimpleNamespace(logits=None, loss=hidden.sum())
        return own(*args, **kwargs)

    model.forward = forward
    expected = scores_of(own(**inputs).logits, inputs["labels"])["log_probs"]
    output = fastpref.fuse_lm_head(model)(**inputs, fused_lm_head=True)
    torch.testing.assert_close(output.log_probs.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.loss, -output.log_probs.sum() / output.label_mask.sum())
    assert refusals(model) == ()


class Shifted(nn.Linear):
    """A head of its own kind."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 0.1 * input[..., :1]


def biased(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias after the head, which no scale and cap can be."""
    own, bias = type(model).forward, torch.linspace(0, 1, model.config.vocab_size)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = own(self, *args, **kwargs)
        output.logits = output.logits + bias
        return output

    monkeypatch.setattr(type(model), "forward", forward)


@pytest.mark.parametrize("case", ["transform", "head", "check"])
def test_what_cannot_be_fused_is_scored_from_logits(
    case: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rightly, with one warning that names the architecture."""
    model, inputs = make("mixtral", output_router_logits=True), batch()
    if case == "transform":
        biased(model, monkeypatch)
        said = "are not a scale and a cap"
    elif case == "head":
        model.lm_head.__class__ = Shifted
        said = "a head of type tests.integrations.causal_lm.test_fuse.Shifted"
    else:
        wrong = measurement.LogitTransform(1.001, None, model.config.vocab_size)
        monkeypatch.setattr(measurement, "fit", lambda outputs, final: wrong)
        said = "away from those of its logits"
    inputs["labels"] = with_likeliest(model, inputs)
    fastpref.fuse_lm_head(model)
    for _ in range(2):
        expected = scores_of(model(**inputs).logits, inputs["labels"])
        output = model(**inputs, fused_lm_head=True, outputs=tuple(expected)[:5])
        assert expected["is_top1"].any()
        for name, value in expected.items():
            found = output[name].to(value.dtype)
            torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5, msg=name)
        own = -output.log_probs.sum() / output.label_mask.sum()
        share = model.config.router_aux_loss_coef * output.aux_loss
        torch.testing.assert_close(output.loss, own + share)
        assert gradients(output.loss, model)
    (record,) = [one for one in caplog.records if one.name == "fastpref"]
    assert said in record.getMessage() and "MixtralForCausalLM" in record.getMessage()


def test_a_scale_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make(), batch()
    own = type(model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = own(self, *args, **kwargs)
        output.logits.mul_(0.3)
        return output

    monkeypatch.setattr(type(model), "forward", forward)
    expected = scores_of(model(**inputs).logits, inputs["labels"])["log_probs"]
    found = fastpref.fuse_lm_head(model, check=False)(**inputs, fused_lm_head=True).log_probs
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert refusals(model) == ()


def test_without_the_check_nothing_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make(), batch()
    wrong = measurement.LogitTransform(2.0, None, model.config.vocab_size)
    monkeypatch.setattr(measurement, "fit", lambda outputs, final: wrong)
    fastpref.fuse_lm_head(model, check=False)
    doubled = scores_of(2 * model(**inputs).logits, inputs["labels"])["log_probs"]
    found = model(**inputs, fused_lm_head=True).log_probs.double()
    torch.testing.assert_close(found, doubled, rtol=1e-5, atol=1e-5)


def test_a_model_that_takes_no_part_of_its_inputs() -> None:
    """Then all of them are run."""
    model, inputs = make(), batch()
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs["input_ids"].shape != inputs["input_ids"].shape:
            raise ValueError("too short")
        return own(*args, **kwargs)

    model.forward = forward
    fastpref.fuse_lm_head(model)
    check_call(model, inputs)
    assert refusals(model) == ()


def test_embeddings_as_inputs() -> None:
    """Of which few are run to measure, as of ids."""
    model, inputs = fastpref.fuse_lm_head(make()), batch(rows=3)
    shapes = []
    model.model.norm.register_forward_hook(lambda *args: shapes.append(tuple(args[-1].shape[:2])))
    expected = model(**inputs, fused_lm_head=True)
    fastpref.unfuse_lm_head(model)
    fastpref.fuse_lm_head(model)
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    found = model(inputs_embeds=embedded, labels=inputs["labels"], fused_lm_head=True)
    assert shapes == 2 * [(2, 8), (2, 8), (3, 10)]
    torch.testing.assert_close(found.log_probs, expected.log_probs)
    assert refusals(model) == ()


REFUSED = {
    "no labels": ({"labels": None}, r"labels is missing.*Pass labels \(B, T\)"),
    "labels of another dtype": (
        {"labels": torch.zeros(2, 10)},
        r"int64.*got \(2, 10\) torch.float",
    ),
    "labels of one row": ({"labels": torch.zeros(10, dtype=torch.int64)}, r"\(B, T\).*\(10,\)"),
    "longer labels": ({"labels": torch.ones(2, 11, dtype=torch.int64)}, r"labels are \(2, 11\)"),
    "an unknown output": ({"outputs": ("entropy", "lse")}, "outputs must be.*among.*'lse'"),
    "a string": ({"outputs": "entropy"}, "outputs must be a tuple.*'entropy'"),
    "logits_to_keep": ({"logits_to_keep": 2}, "no logits_to_keep"),
    "a temperature of 0": ({"temperature": 0.0}, "temperature"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_calls_that_are_refused(case: str) -> None:
    given, said = REFUSED[case]
    model = fastpref.fuse_lm_head(make())
    with pytest.raises(ValueError, match=said):
        model(**{**batch(), **given}, fused_lm_head=True)
    head = model.get_output_embeddings()
    assert "forward" not in vars(head) and not head._forward_hooks
    assert "_loss_function" not in vars(model)
    check_call(model, batch())


def test_models_that_are_refused() -> None:
    from transformers import CONFIG_MAPPING, AutoModel, AutoModelForSeq2SeqLM

    config = CONFIG_MAPPING["t5"](
        d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=64
    )
    with pytest.raises(ValueError, match=r"encoder-decoder \(T5ForConditionalGeneration\)"):
        fastpref.fuse_lm_head(AutoModelForSeq2SeqLM.from_config(config))
    backbone = AutoModel.from_config(make().config)
    with pytest.raises(ValueError, match=r"no output head: LlamaModel.*AutoModelForCausalLM"):
        fastpref.fuse_lm_head(backbone)
    for other in (nn.Linear(2, 3), nn.Sequential(make())):
        with pytest.raises(
            TypeError, match=rf"PreTrainedModel.*got {type(other).__name__}.*module"
        ):
            fastpref.fuse_lm_head(other)
        with pytest.raises(TypeError, match="PreTrainedModel"):
            fastpref.unfuse_lm_head(other)


class Packed(nn.Module):
    """As GPTQ has it."""

    def __init__(self) -> None:
        super().__init__()
        self.qweight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int32), requires_grad=False)


def int8_linear() -> nn.Linear:
    head = nn.Linear(4, 4)
    head.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return head


@pytest.mark.parametrize("head", [Packed, int8_linear])
def test_quantised_heads_are_refused(head: Any) -> None:
    model = make()
    model.lm_head = head()
    with pytest.raises(ValueError, match=r"of LlamaForCausalLM is quantised \(.*Dequantise it"):
        fastpref.fuse_lm_head(model)
