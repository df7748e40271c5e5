# SPDX-License-Identifier: Apache-2.0
"""TRL's DPOTrainer with what a patch cannot add: any objective, its columns and its state, batches
without padding or with each prompt once, and LoRA on the output head."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from trl import DPOTrainer

from ... import sequence_logp
from ...objectives import Objective
from ..transformers import PreferenceCollator, PreferenceLabels, PreferenceLoss, loss_func
from .heads import add_fused_lm_head
from .library import trl_module
from .metrics import log_pairs, log_tokens
from .packing import PADDING_FREE
from .parts import heads_put
from .prefix_sharing import PREFIX_SHARING, sharing_supported

# Names under which batches have what is not for the model.
REFERENCE = "ref_logps"


class FastDPOTrainer(DPOTrainer):
    """``FastDPOTrainer(model, ..., objective="simpo", beta=2.0, gamma=0.5)``.

    Takes what TRL's DPOTrainer takes. The model's head is ``fuse_lm_head``, whatever the
    architecture, with LoRA on it or not. Needs TRL 1.15 or newer.

    Args:
        objective: the name of one, an ``Objective``, or a pairwise function, in place of the loss
            that ``args`` names; further keyword arguments are its hyperparameters, and those of
            ``args`` (beta, label_smoothing, loss_type, ...) have no effect. What it takes beside
            log-probabilities are columns of the data set by the objective's names; averages over
            the training are kept, and saved with every checkpoint. Objectives of pairs take TRL's
            data sets. Those of lists and of single responses take token ids, see
            ``fastpref.integrations.transformers.PreferenceCollator``. For an objective
            without a reference none is loaded. None: TRL's own losses.
        prefix_sharing: run each pair's prompt through the model once, with both completions behind
            it, under any objective of pairs and TRL's own losses: same losses, gradients and
            metrics, for P + 2 C tokens in place of 2 P + 2 C (0.58 of the time of a step with long
            prompts, see the README), and a mask of their square a pair. Needs attention to all
            earlier tokens by "sdpa" or "eager", and positions that can be given.

    ``args.padding_free``, which TRL does not serve, keeps padding out of the model. Attention
    that does not skip what it masks (sdpa) multiplies every row with every other for it.

    With adapters alone trained the head costs three products a step, two of the policy and one of
    the reference, which is the policy without them. Scoring both at once would spare none;
    ``args.precompute_ref_log_probs`` spares the reference's.

    Raises:
        ValueError: a column that the objective needs and the data set has not; settings of TRL that
            an objective does not go with; a model, an objective or settings that prompts cannot be
            shared with; what ``fuse_lm_head`` or the objective refuses.
        TypeError: a keyword argument that is neither TRL's nor the objective's.
        RuntimeError: an older TRL; a model that was seen to score otherwise without padding, or
            with prompts shared.
    """

    preference_loss: PreferenceLoss | None = None
    # TRL says less of them, or nothing.
    args: Any
    model: Any
    train_dataset: Any
    _signature_columns: Any

    def __init__(
        self,
        *args: Any,
        objective: str | Objective | Callable[..., Any] | None = None,
        prefix_sharing: bool = False,
        **kwargs: Any,
    ) -> None:
        signature = inspect.signature(DPOTrainer.__init__)
        own = {name: kwargs.pop(name) for name in list(kwargs) if name in signature.parameters}
        if objective is None and kwargs:
            raise TypeError(
                f"{', '.join(kwargs)} belongs to an objective, and objective is None. Pass for "
                'example objective="simpo"'
            )
        bound = signature.bind_partial(self, *args, **own).arguments
        config = bound.get("args")
        loading: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if objective is not None:
            self.preference_loss = loss_func(objective, **kwargs)
            self._columns = self._collator(pad_token_id=0).columns
            _check_settings(config, own, bool(self._columns.reference))
            if not self._columns.reference:
                loading = _without_reference(isinstance(bound.get("model"), str))
        padding_free = config is not None and config.padding_free
        put: Callable[..., None] = add_fused_lm_head
        if prefix_sharing:
            self._check_pairs(padding_free)
            put = _put_sharing_head
        elif padding_free:
            put = functools.partial(add_fused_lm_head, form=PADDING_FREE)
        with _left_to_the_head(config), heads_put(put), loading:
            super().__init__(*args, **own)
        if prefix_sharing and self.aux_loss_enabled:
            raise ValueError(
                "prefix_sharing=True runs a prompt once, and the load-balancing loss of a "
                "mixture of experts counts it twice; got router_aux_loss_coef="
                f"{self.router_aux_loss_coef}. Set DPOConfig(router_aux_loss_coef=0.0), or "
                "prefix_sharing=False"
            )
        self.padding_free = padding_free
        if self.preference_loss is not None:
            self._use_objective(own.get("data_collator"))

    def _check_pairs(self, padding_free: bool) -> None:
        """Raise ValueError where batches are no padded pairs."""
        remedy = "set prefix_sharing=False"
        if padding_free:
            raise ValueError(
                "prefix_sharing=True and padding_free=True join rows each in its own way; got both."
                f" Set DPOConfig(padding_free=False), or {remedy}"
            )
        if self.preference_loss is not None and self._columns.unit != "pair":
            raise ValueError(
                f"prefix_sharing=True shares the prompt of a pair, and {self._columns.name} takes "
                f"each {self._columns.unit} by itself; {remedy}, or choose an objective of pairs"
            )

    def _collator(self, **settings: Any) -> PreferenceCollator:
        return PreferenceCollator(self._loss.objective, **settings)

    @property
    def _loss(self) -> PreferenceLoss:
        if self.preference_loss is None:
            raise RuntimeError("this trainer has TRL's own losses")
        return self.preference_loss

    def _use_objective(self, collator: Any) -> None:
        columns, names = self._columns, self.train_dataset.column_names
        _check_columns(columns, names)
        if collator is None:
            settings = {"max_length": self.args.max_length}
            collator = self._collator(pad_token_id=self._tokenizer.pad_token_id, **settings)
            if not set(columns.reference) <= set(names or ()):  # else precomputed
                collator.columns = dataclasses.replace(columns, reference=())
        self.data_collator = collator
        if self.aux_loss_enabled:
            self._loss.aux_loss_coef = self.router_aux_loss_coef
        self.add_callback(self._loss.callback)

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        if self.preference_loss is None:
            return super()._prepare_dataset(dataset, *args)
        names = dataset.column_names or list(next(iter(dataset)))
        if set(self._columns.tokens) <= set(names):
            return dataset
        if self._columns.unit != "pair":
            raise ValueError(
                f"{self._columns.name} takes data sets with the columns "
                f"{', '.join(self._columns.tokens)}, of token ids; got {', '.join(names)}. "
                "Tokenise the data set first"
            )
        return super()._prepare_dataset(dataset, *args)

    def _set_signature_columns_if_needed(self) -> None:
        base: Any = super()
        base._set_signature_columns_if_needed()
        if self.preference_loss is not None:
            columns = self._columns
            more = (*columns.tokens, *columns.reference, *columns.needed, *columns.optional)
            self._signature_columns = [*self._signature_columns, *more, "label"]

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Of a batch of the trainer's: sums over each chosen, and each rejected completion; over
        each completion, where an objective does not compare pairs."""
        base: Any = super()
        if "fused_labels" not in inputs:
            return base.compute_ref_log_probs(model, inputs)
        tokens = {name: value for name, value in inputs.items() if name != "labels"}
        labels = tokens.pop("fused_labels")
        batch = {**tokens, "completion_mask": (labels != -100).long()}
        batch.pop("fused_lm_head")
        halves = base.compute_ref_log_probs(model, batch)
        return halves if self._columns.unit == "pair" else torch.cat(halves)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        base: Any = super()
        if self.preference_loss is None:
            return base._compute_loss(model, inputs, return_outputs)
        labels: PreferenceLabels = inputs["labels"]
        given = {name: value for name, value in inputs.items() if name != "labels"}
        if self._columns.reference and REFERENCE not in labels:
            labels.put(REFERENCE, self._reference(given, labels))
        if self.aux_loss_enabled:
            given["output_router_logits"] = True
        output = model(**given, use_cache=False)
        loss = self.preference_loss(output, labels)
        self._log(output, given, labels)
        return (loss, output) if return_outputs else loss

    def _reference(self, given: dict[str, Any], labels: PreferenceLabels) -> Tensor:
        """(U, r) sums of the reference model, or of the policy without its adapter."""
        found = self.compute_ref_log_probs(self.ref_model or self.model, given)
        if self._columns.unit == "pair":
            return torch.stack(found, dim=1)
        present: Tensor = labels.lengths > 0
        return torch.zeros_like(present, dtype=found.dtype).masked_scatter(present, found)

    def _log(self, output: Any, given: dict[str, Any], labels: PreferenceLabels) -> None:
        mask = given["fused_labels"][:, 1:] != -100
        log_tokens(self, output, mask, given["attention_mask"])
        if output.aux_loss is not None:
            mode = "train" if self.model.training else "eval"
            aux_loss = self.accelerator.gather_for_metrics(output.aux_loss.detach())
            self._metrics[mode]["aux_loss"].append(aux_loss.mean().item())
        if self._columns.unit == "pair":
            rewards = self._loss.rewards((output.log_probs, mask), labels)
            logps = sequence_logp(output.log_probs.detach()).view(2, -1)
            log_pairs(self, output, mask, rewards.t(), logps)


def _put_sharing_head(model: Any, *args: Any, **kwargs: Any) -> None:
    reason = sharing_supported(model)
    if reason is not None:
        raise ValueError(f"prefix_sharing=True does not go with this model: {reason}")
    add_fused_lm_head(model, *args, form=PREFIX_SHARING, **kwargs)


@contextlib.contextmanager
def _left_to_the_head(config: Any) -> Iterator[None]:
    """Within it TRL does not see ``padding_free``, which it would warn of."""
    if config is None or not config.padding_free:
        yield
        return
    config.padding_free = False
    try:
        yield
    finally:
        config.padding_free = True


@contextlib.contextmanager
def _without_reference(by_name: bool) -> Iterator[None]:
    """Within it TRL loads no reference model, which an objective without one would only hold; the
    policy, where it is given ``by_name``, is loaded first."""
    module: Any = trl_module("trl.trainer.dpo_trainer")
    found = module.create_model_from_path
    policies = [found] if by_name else []
    module.create_model_from_path = lambda *args, **kwargs: (
        policies.pop()(*args, **kwargs) if policies else None
    )
    try:
        yield
    finally:
        module.create_model_from_path = found


def _check_settings(config: Any, own: dict[str, Any], reference: bool) -> None:
    """Raise ValueError on what would be without effect."""
    odd = {"compute_metrics": own.get("compute_metrics")}
    if config is not None:
        odd |= {
            "truncation_mode": None if config.truncation_mode == "keep_start" else "keep_end",
            "pad_to_multiple_of": config.pad_to_multiple_of,
            "ld_alpha": config.ld_alpha,
            "use_weighting": config.use_weighting or None,
        }
        if not reference:
            names = ("sync_ref_model", "precompute_ref_log_probs")
            odd |= {name: getattr(config, name) or None for name in names}
    found = [f"{name}={value!r}" for name, value in odd.items() if value is not None]
    if found:
        raise ValueError(
            f"{', '.join(found)} does not go with an objective; leave it out, or leave out "
            "objective for TRL's own losses"
        )


def _check_columns(columns: Any, names: list[str] | None) -> None:
    missing = [
        {"labels": "label"}.get(name, name)
        for name in columns.needed
        if {"labels": "label"}.get(name, name) not in (names or ())
    ]
    if names is not None and missing:
        raise ValueError(
            f"{columns.name} needs the columns {', '.join(missing)} of the data set; got "
            f"{', '.join(names)}. Add them, one number for each row, or choose another objective"
        )
