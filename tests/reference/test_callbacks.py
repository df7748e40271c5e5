# SPDX-License-Identifier: Apache-2.0
"""A reference in a training moves by the formula and at the steps that were asked for, lies in
every checkpoint, and a resumed training is the same to the bit."""

import contextlib
import shutil

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")

from fastpref.reference import ReferenceCallback, adapter_tensors, frozen_copy
from fastpref.reference.moving import MovingReference
from tests.integrations.transformers.trainings import make_model
from tests.reference.models import lora
from tests.reference.trainings import Live, Weights, make_trainer


def model_reference(reference):
    return lambda policy: contextlib.nullcontext(reference)


@contextlib.contextmanager
def adapter_reference(policy):
    policy.set_adapter("reference", inference_mode=True)
    try:
        yield policy
    finally:
        policy.set_adapter("default")


def run(folder, *, decay, every, resume=None, checkpoint=None, restored=False, **arguments):
    """Reference and policy after a training of twelve steps, and the policy's weights of each."""
    reference, weights = frozen_copy(make_model(seed=1)), Weights()
    callback = ReferenceCallback(reference, decay=decay, every=every, checkpoint=checkpoint)
    trainer = make_trainer(
        folder,
        callbacks=[callback, weights],
        restore_callback_states_from_checkpoint=restored,
        **arguments,
    )
    trainer.reference = model_reference(reference)
    trainer.train(resume_from_checkpoint=resume)
    return reference, trainer.model, weights.steps


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("decay", "every", "due"),
    [(0.4, 5, [5, 10]), (0.0, "epoch", [6, 12]), (0.9, (2, 7), [2, 7])],
)
def test_when_and_how_it_moves(decay, every, due, tmp_path):
    reference, _, steps = run(tmp_path, decay=decay, every=every)
    assert len(steps) == 13
    for name, one in reference.named_parameters():
        want = dict(make_model(seed=1).named_parameters())[name].detach().double()
        for step in due:
            want = decay * want + (1 - decay) * steps[step][name].double()
        torch.testing.assert_close(one.double(), want, rtol=1e-5, atol=1e-7)
    assert not torch.equal(steps[12]["lm_head.weight"], steps[0]["lm_head.weight"])


def same(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in mine.items())


@pytest.mark.heavy
@pytest.mark.parametrize("restored", [pytest.param(False, marks=pytest.mark.slow), True])
def test_resumed_to_the_bit(restored, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4}
    given = {"decay": 0.7, "every": 3, "restored": restored}
    reference, policy, _ = run(tmp_path / "a", **given, **saving)
    start = str(tmp_path / "a" / "checkpoint-4")
    again = run(tmp_path / "b", resume=start, **given)
    assert same(reference, again[0]) and same(policy, again[1]) and len(again[2]) == 9
    # The reference mattered: from another one the policy goes elsewhere.
    other = run(tmp_path / "c", decay=0.0, every=1, **saving)
    assert not same(policy, other[1])
    # Moved away, and named.
    moved = shutil.move(start, tmp_path / "moved")
    with pytest.raises(ValueError, match=r"is not in .*checkpoint=\.\.\."):
        run(tmp_path / "d", resume=str(moved), **given)
    named = run(tmp_path / "d", resume=str(moved), checkpoint=moved, **given)
    assert same(reference, named[0]) and same(policy, named[1])
    # Another training has written there since.
    shutil.copytree(tmp_path / "c" / "checkpoint-4", start)
    with pytest.raises(ValueError, match="is not in"):
        run(tmp_path / "d", resume=str(moved), **given)


def test_a_checkpoint_of_a_compiled_reference(tmp_path):
    """Serves the same one without torch.compile, and the other way round."""
    policy, first, second = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    compiled = torch.compile(first, backend="eager")
    MovingReference(compiled, 0.5, 1).save(tmp_path, policy, writes=True)
    MovingReference(second, 0.5, 1).load(tmp_path, policy)
    assert same(first, second)
    with torch.no_grad():
        first.weight.zero_()
    MovingReference(compiled, 0.5, 1).load(tmp_path, policy)
    assert same(first, second)


@pytest.mark.heavy
def test_a_checkpoint_of_a_training_without(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=4)
    trainer.reference = model_reference(frozen_copy(trainer.model))
    trainer.train()
    with pytest.raises(ValueError, match="step 4 holds no reference"):
        run(tmp_path / "b", decay=0.0, every=2, resume=str(tmp_path / "checkpoint-4"))


@pytest.mark.heavy
def test_an_adapter_is_the_reference(tmp_path):
    """The trained one's average, in a LoRA model; resumed to the bit."""

    def train(folder, resume=None, **arguments):
        model, weights = lora(adapters=("default", "reference")), Weights()
        start = [one.detach().clone() for one in adapter_tensors(model, "reference")]
        trainer = make_trainer(
            folder,
            model=model,
            callbacks=[ReferenceCallback("reference", decay=0.8, every=6), weights],
            **arguments,
        )
        trainer.reference = adapter_reference
        trainer.train(resume_from_checkpoint=resume)
        return model, start, weights.steps

    model, start, steps = train(tmp_path / "a", save_strategy="steps", save_steps=8)
    names = [name for name in steps[0] if ".default." in name]
    for one, want, name in zip(adapter_tensors(model, "reference"), start, names, strict=True):
        for step in (6, 12):
            want = 0.8 * want + 0.2 * steps[step][name]
        torch.testing.assert_close(one.detach(), want)
        assert not torch.equal(steps[12][name], steps[0][name])
    assert all(
        torch.equal(value, steps[0][name])
        for name, value in steps[12].items()
        if "lora" not in name
    )
    again, *_ = train(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-8"))
    assert same(model, again)


@pytest.mark.heavy
def test_two_in_one_training(tmp_path):
    reference = frozen_copy(make_model(seed=1))
    callbacks = [ReferenceCallback(reference, every=1) for _ in range(2)]
    trainer = make_trainer(tmp_path, callbacks=callbacks)
    trainer.reference = model_reference(reference)
    with pytest.raises(ValueError, match="callbacks must hold one ReferenceCallback, got 2"):
        trainer.train()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every": 0}, ValueError, "every must be at least 1 step, got 0"),
        ({"every": "step"}, ValueError, "'epoch' or steps, got 'step'"),
        ({"every": 1.5}, TypeError, "every must be a number of optimizer steps.*got float"),
        ({"every": [3, 0]}, ValueError, "every must hold optimizer steps, counted from 1"),
        ({"every": 2, "decay": 1.0}, ValueError, "decay must be in"),
        ({"every": 2, "reference": 3}, TypeError, r"reference must be a torch\.nn\.Module"),
    ],
)
def test_bad_use(arguments, error, message):
    reference = arguments.pop("reference", "reference")
    with pytest.raises(error, match=message):
        ReferenceCallback(reference, **arguments)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        (lambda: make_model(), "ref", r"model must be a peft\.PeftModel, got LlamaForCausalLM"),
        (
            lambda: lora(),
            "ref",
            "reference must be one of the model's adapters, default, got 'ref'",
        ),
        (lambda: lora(), "default", "an adapter beside the one that is trained, got 'default'"),
    ],
)
def test_no_such_adapter(model, name, message, tmp_path):
    trainer = make_trainer(
        tmp_path, trainer=Live, model=model(), callbacks=[ReferenceCallback(name, every=1)]
    )
    with pytest.raises((TypeError, ValueError), match=message):
        trainer.train()
