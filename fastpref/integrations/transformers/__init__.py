# SPDX-License-Identifier: Apache-2.0
"""Preference losses in transformers' own ``Trainer``::

    from fastpref.integrations import transformers as preference

    model = fastpref.fuse_lm_head(model)
    loss = preference.loss_func("dpo", beta=0.1)
    collator = preference.PreferenceCollator(loss.objective, pad_token_id=tokenizer.pad_token_id)
    dataset = preference.add_reference_logps(dataset, model, collator)
    Trainer(model, args, data_collator=collator, train_dataset=dataset, compute_loss_func=loss)

with ``remove_unused_columns=False`` among the arguments. The collator hands the targets to the
model's fused head, and what the loss needs beside the tokens to the loss, as ``labels``, of which
the Trainer counts one item a pair, list or response. The loss is their mean over all micro-batches
and ranks of an optimizer step, so accumulated gradients are those of one large batch; an objective
whose losses depend on their batch (scope "batch") sees one micro-batch at a time, of all ranks
where it is given a ``dp_group``.
"""

from .collator import PreferenceCollator
from .labels import PreferenceLabels
from .loss import PreferenceLoss, loss_func
from .reference import add_reference_logps

__all__ = [
    "PreferenceCollator",
    "PreferenceLabels",
    "PreferenceLoss",
    "add_reference_logps",
    "loss_func",
]
