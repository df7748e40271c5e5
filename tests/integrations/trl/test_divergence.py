# SPDX-License-Identifier: Apache-2.0
"""TRL's distillation: its divergence against fastpref's, alone and in its trainer."""

import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.integrations import trl as integration
from tests.integrations.trl.runs import ARGUMENTS, RELEASE, plain_divergence

pytest.importorskip("trl", reason='TRL is not installed (pip install "fastpref[trl]")')
pytestmark = pytest.mark.filterwarnings("ignore:.* will be removed in v6:FutureWarning")
B, K, V = 3, 7, 259

HEADS: dict[str, dict[str, float]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "cap and scale": {"softcap": 3.0, "scale": 0.25, "temperature": 1.3},
}


@pytest.fixture
def distillation(trl_utils: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    import trl.trainer.distillation_trainer as module

    if RELEASE == (1, 15):  # runs on GPUs only
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        plain = staticmethod(plain_divergence)
        monkeypatch.setattr(ChunkedDivergenceFunction, "apply", plain)
    return module


def make_call(bias: bool, head: dict[str, float], mask: Tensor, **more: Any) -> dict[str, Any]:
    """Student and teacher of different widths."""
    torch.manual_seed(0)
    call: dict[str, Any] = {"completion_mask": mask, **more}
    for name, width in (("student", 24), ("teacher", 40)):
        call[f"{name}_hidden_states"] = torch.randn(B, K, width)
        call[f"{name}_lm_head_weight"] = torch.randn(V, width) / width**0.5
        call[f"{name}_lm_head_bias"] = torch.randn(V) if bias else None
        call[f"{name}_logit_scale"] = head.get("scale", 1.0)
        call[f"{name}_final_logit_softcapping"] = head.get("softcap")
    call["temperature"] = head.get("temperature", 1.0)
    return call


def result(loss: Any, call: dict[str, Any]) -> tuple[Tensor, ...]:
    """What it returns, and the gradients of the student."""
    if "chunk_size" in inspect.signature(loss).parameters:
        call = {**call, "chunk_size": 4}
    names = [name for name in call if name.startswith("student_")]
    trained = [call[name] for name in names if isinstance(call[name], Tensor)]
    for value in trained:
        value.requires_grad_()
    value, entropy, count = loss(**call)
    assert not entropy.requires_grad or "chunk_size" in call
    return value, entropy, count, *torch.autograd.grad(value, trained)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("items", [None, 11])
def test_loss_and_gradients_are_those_of_trl(
    head: str, beta: float, items: int | None, distillation: Any
) -> None:
    mask = (torch.rand(B, K) < 0.6).long()
    more = {"beta": beta, "num_items_in_batch": items}
    call = make_call(bias=head == "plain", head=HEADS[head], mask=mask, **more)
    expected = result(distillation._chunked_divergence_loss, call)
    with integration.patched():
        found = result(distillation._chunked_divergence_loss, call)
    assert len(found) == len(expected) == (6 if head == "plain" else 5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


def test_a_batch_without_completions_is_a_zero(distillation: Any) -> None:
    call = make_call(False, {}, torch.zeros(B, K, dtype=torch.int64), beta=0.5)
    with integration.patched():
        loss, entropy, count, *gradients = result(distillation._chunked_divergence_loss, call)
    assert loss == entropy == count == 0
    assert not any(gradient.any() for gradient in gradients)


def test_what_fastpref_does_not_do_is_done_by_trl(
    distillation: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A teacher with another scale than the student's, said once."""
    call = make_call(False, {}, torch.ones(B, K, dtype=torch.int64), beta=0.5)
    call["teacher_logit_scale"] = 0.5
    expected = result(distillation._chunked_divergence_loss, call)
    with integration.patched(), caplog.at_level(logging.WARNING, logger="fastpref"):
        found = result(distillation._chunked_divergence_loss, call)
        result(distillation._chunked_divergence_loss, call)
    assert all(map(torch.equal, found, expected))
    assert [record.message for record in caplog.records] == [
        "TRL's own divergence serves: logit_scale is 1.0 of the student and 0.5 of the teacher"
    ]


def test_another_divergence_is_refused(
    distillation: Any, monkeypatch: pytest.MonkeyPatch, trl_utils: Any
) -> None:
    own = trl_utils._ChunkedLogProbFunction
    monkeypatch.setattr(distillation, "_chunked_divergence_loss", lambda student, teacher: None)
    with pytest.raises(RuntimeError, match=r"_chunked_divergence_loss\(student, teacher\)"):
        integration.patch()
    assert trl_utils._ChunkedLogProbFunction is own


@pytest.mark.parametrize("beta", [0.5, pytest.param(0.0, marks=pytest.mark.slow)])
def test_distillation_trainer(
    beta: float,
    tmp_path: Path,
    tokenizer: Any,
    preferences: Any,
    make_model: Any,
    compare: Any,
    distillation: Any,
) -> None:
    from trl import DistillationConfig, DistillationTrainer

    compare(
        lambda: DistillationTrainer(
            model=make_model(),
            teacher_model=make_model(seed=1),
            args=DistillationConfig(
                output_dir=str(tmp_path), **ARGUMENTS, beta=beta, max_completion_length=8
            ),
            train_dataset=preferences.select_columns("prompt"),
            processing_class=tokenizer,
        ),
        through="divergence",
    )
