# SPDX-License-Identifier: Apache-2.0
"""Any causal language model of transformers scored through fastpref, without its logits::

    fastpref.fuse_lm_head(model)
    output = model(input_ids=ids, labels=labels, fused_lm_head=True, outputs=("entropy",))
    output.loss.backward()

The model's own forward runs. Its output head is answered by ``linear_logprob`` in place of the
product, within the head's own ``forward``, so that whatever is wrapped around the model or the head
(DDP, FSDP, ZeRO, PEFT, device maps) does its work as ever. What the model does to its head's
outputs, such as a cap or a scale, is measured, not read from its configuration.

``fuse`` puts the forward there, ``call`` is one call of it, ``request`` what was asked for and
``output`` what comes back; ``measurement`` and ``transform`` find what becomes of the head's
outputs; ``head``, ``adapters`` and ``projection`` read the head, ``interception`` stands in for it,
``scores`` scores.
"""

from .fuse import fuse_lm_head, unfuse_lm_head

__all__ = ["fuse_lm_head", "unfuse_lm_head"]
