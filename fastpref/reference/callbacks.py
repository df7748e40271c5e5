# SPDX-License-Identifier: Apache-2.0
"""Moving references and adapter pairs in transformers' Trainer, and so in TRL's."""

from __future__ import annotations

import json
import secrets
from os import PathLike
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from ..objectives.checks import is_integer
from .moving import Every, MovingReference
from .pair import AdapterPair

FOLDER, RUN = "reference", "run.json"


def ReferenceCallback(
    reference: nn.Module | str,
    *,
    decay: float = 0.0,
    every: Every,
    checkpoint: str | Path | None = None,
) -> Any:
    """A ``TrainerCallback`` under which the reference follows the policy (``update_``).

    TR-DPO (arXiv:2404.09656): ``decay=0.4, every=64`` is the soft update at alpha 0.6,
    ``every=512`` the hard one. A copy ``every="epoch"`` is the reference of SPIN and DNO where an
    iteration is an epoch; ``every=sampler.last_steps(pairs_per_step)`` that of Curry-DPO's stages.

    The reference has to be a live one. TRL: ``trainer.add_callback(ReferenceCallback(trainer.
    ref_model, ...))``, or ``"ref"`` where TRL keeps the reference as an adapter of that name.

    Every checkpoint gets a folder ``reference``, with shards under FSDP2, and a resumed training
    goes on to the bit. Where a checkpoint was moved from where it was written, ``checkpoint`` says
    where it is.

    Args:
        reference: a model beside the policy, sharded as it is, or the name of an adapter of the
            policy beside the one that trains.
        decay: weight of the old reference, in [0, 1); 0 copies the policy.
        every: number of optimizer steps between two updates, "epoch", or the steps after which
            there is one.
        checkpoint: the folder given to ``resume_from_checkpoint``.
    """
    moving = MovingReference(reference, decay, every)
    if checkpoint is not None and not isinstance(checkpoint, (str, PathLike)):
        raise TypeError(f"checkpoint must be a folder, got {type(checkpoint).__name__}")
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    # Where the Trainer restores callbacks it makes new ones of their class, without arguments: a
    # class of its own knows what it keeps.
    class ReferenceCallback(TrainerCallback, ExportableState):
        run: str = ""  # of the training that writes a checkpoint, in its state and in its folder
        folder: str = ""

        def state(self) -> dict[str, Any]:
            kept = type(self)
            return {"args": {}, "attributes": {"run": kept.run, "folder": kept.folder}}

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            name, kept, policy = type(self).__name__, type(self), given["model"]
            saved = state.stateful_callbacks.get(name)
            if isinstance(saved, list) and len(saved) > 1:
                raise ValueError(f"callbacks must hold one ReferenceCallback, got {len(saved)}")
            if getattr(args, "precompute_ref_log_probs", False):
                raise ValueError(
                    "precompute_ref_log_probs must be False with a ReferenceCallback, got True: "
                    "log-probabilities taken beforehand are of a reference that does not move"
                )
            moving.check(policy)
            if state.global_step > 0:
                moving.load(_stored(args, state, name, checkpoint), policy)
            kept.run, kept.folder = secrets.token_hex(8), str(Path(args.output_dir).absolute())
            state.stateful_callbacks[name] = self.state()

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            moving.after_step(given["model"], state.global_step)

        def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            moving.after_epoch(given["model"])

        def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if state.is_hyper_param_search:  # in folders of its trials, which nothing resumes
                return
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FOLDER
            moving.save(folder, given["model"], writes=args.should_save)
            if args.should_save:
                (folder / RUN).write_text(json.dumps(type(self).run), encoding="utf-8")

    return ReferenceCallback()


def _stored(args: Any, state: Any, name: str, checkpoint: str | Path | None) -> Path:
    """Where the reference of the checkpoint lies that the training resumes from, which the Trainer
    does not say: where it was written, unless it is told."""
    saved = state.stateful_callbacks.get(name) or {}
    run, written = (saved.get("attributes", {}).get(one) for one in ("run", "folder"))
    if run is None:
        raise ValueError(
            f"the checkpoint of step {state.global_step} holds no reference; it is of a training "
            "without ReferenceCallback: begin a new one from its weights"
        )
    if checkpoint is not None:
        places = [Path(checkpoint)]
    else:
        there = f"checkpoint-{state.global_step}"
        places = [Path(written) / there, Path(args.output_dir) / there]
    for place in places:
        mark = place / FOLDER / RUN
        if mark.is_file() and json.loads(mark.read_text(encoding="utf-8")) == run:
            return place / FOLDER
    raise ValueError(
        f"the reference of the checkpoint of step {state.global_step} is not in "
        f"{' or '.join(str(one / FOLDER) for one in places)}; pass ReferenceCallback(..., "
        "checkpoint=...) the folder that the training resumes from"
    )


def AdapterPairCallback(pair: AdapterPair, *, every: int) -> Any:
    """A ``TrainerCallback`` under which fast and slow adapter exchange roles (``switch``).

    The losses of both are those that ``compute_loss`` gives to ``pair.record``, the optimizer has
    the groups of ``pair.parameter_groups``. Ranks decide together. Roles and recorded losses are in
    every checkpoint, and a resumed training goes on to the bit.

    Args:
        pair: of the model in training.
        every: optimizer steps between two decisions.
    """
    if not isinstance(pair, AdapterPair):
        raise TypeError(f"pair must be an AdapterPair, got {type(pair).__name__}")
    if not is_integer(every):
        raise TypeError(f"every must be a number of optimizer steps, got {type(every).__name__}")
    if every < 1:
        raise ValueError(f"every must be at least 1 step, got {every}")
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    class AdapterPairCallback(TrainerCallback, ExportableState):
        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": {"pair": pair.state_dict()}}

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            name = type(self).__name__
            if state.global_step > 0:
                saved = (state.stateful_callbacks.get(name) or {}).get("attributes", {})
                if "pair" not in saved:
                    raise ValueError(
                        f"the checkpoint of step {state.global_step} holds no roles of adapters; "
                        "it is of a training without AdapterPairCallback: begin a new one from "
                        "its weights"
                    )
                pair.load_state_dict(saved["pair"])
            state.stateful_callbacks[name] = self.state()

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if state.global_step % every == 0:
                group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
                pair.switch(given["optimizer"], given["lr_scheduler"], dp_group=group)

    return AdapterPairCallback()
