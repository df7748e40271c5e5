# SPDX-License-Identifier: Apache-2.0
"""TRL 1.13 and 1.14, whose fused head gives two outputs: by itself, and 1.14's in trainers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref.integrations import trl as integration
from tests.integrations.trl.head_calls import TILE, make_inputs
from tests.integrations.trl.runs import ARGUMENTS, RELEASE, plain_head, through_head

pytest.importorskip("trl", reason='TRL is not installed (pip install "fastpref[trl]")')
pytestmark = [pytest.mark.filterwarnings("ignore:.* will be removed in v6:FutureWarning")]
only_older = pytest.mark.skipif(RELEASE >= (1, 15), reason="of TRL 1.13 and 1.14")
in_trainers = pytest.mark.skipif(RELEASE != (1, 14), reason="of TRL 1.14")


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("of_trl", [pytest.param(True, marks=only_older), False])
def test_two_outputs_and_their_gradients(softcap: float | None, of_trl: bool) -> None:
    """As TRL's own, and where that has five outputs as from all logits."""
    inputs = make_inputs(bias=True)
    hidden, weight, bias, targets = inputs
    settings = (0.7, TILE, softcap, 0.5)
    if of_trl:
        import trl.trainer.utils

        expected = trl.trainer.utils._ChunkedLogProbFunction.apply(*inputs, *settings)
    else:
        expected = plain_head(*inputs, *settings, ("entropy",))[:2]
    found = integration.PairAdapter.apply(*inputs, *settings)
    assert len(found) == len(expected) == 2
    upstream = torch.randn(2, len(targets))
    results = [
        torch.autograd.grad(sum((a * b).sum() for a, b in zip(values, upstream, strict=True)), t)
        for values, t in ((found, (hidden, weight, bias)), (expected, (hidden, weight, bias)))
    ]
    for one, other in zip((*found, *results[0]), (*expected, *results[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


@only_older
def test_patch_reaches_every_module_that_has_the_name(trl_utils: Any) -> None:
    import trl.trainer.dpo_trainer as dpo_trainer

    found = trl_utils._ChunkedLogProbFunction
    with integration.patched():
        assert trl_utils._ChunkedLogProbFunction is integration.PairAdapter
        if RELEASE == (1, 14):
            assert dpo_trainer._ChunkedLogProbFunction is integration.PairAdapter
    assert trl_utils._ChunkedLogProbFunction is found
    if RELEASE == (1, 14):
        assert dpo_trainer._ChunkedLogProbFunction is found
    with pytest.raises(RuntimeError, match=r"Expected: TRL 1\.15 or newer"):
        integration.patch(fix_heads=True)


@in_trainers
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "sft"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_dpo(loss: str, architecture: str, make_dpo: Any, compare: Any) -> None:
    compare(lambda: through_head(make_dpo(architecture=architecture, loss_type=[loss])))


@in_trainers
def test_kto(tmp_path: Path, tokenizer: Any, labelled: Any, make_model: Any, compare: Any) -> None:
    from trl import KTOConfig, KTOTrainer

    compare(
        lambda: through_head(
            KTOTrainer(
                model=make_model(),
                ref_model=make_model(seed=1),
                args=KTOConfig(output_dir=str(tmp_path), **ARGUMENTS, beta=0.5),
                train_dataset=labelled,
                processing_class=tokenizer,
            )
        )
    )


@in_trainers
def test_grpo(make_sampling: Any, compare: Any) -> None:
    from trl import GRPOConfig, GRPOTrainer

    compare(lambda: through_head(make_sampling(GRPOTrainer, GRPOConfig)))
