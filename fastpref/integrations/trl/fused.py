# SPDX-License-Identifier: Apache-2.0
"""What the subclasses of TRL's trainers share: models that score labels without logits."""

from __future__ import annotations

from typing import Any

from ... import fuse_lm_head


class Fused:
    """Before a trainer of TRL: fuses the heads of its models.

    Raises:
        ValueError: an encoder-decoder, a model without an output head or with a quantised one, or
            several GPUs in one process.
    """

    model: Any
    ref_model: Any = None
    accelerator: Any
    args: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = args[0] if args else kwargs.get("model")
        if given is not None and not isinstance(given, str):
            fuse_lm_head(given)  # what cannot be fused is refused before the data are tokenised
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{type(self).__name__} got {self.args.n_gpu} GPUs in one process, which Trainer "
                "wraps in nn.DataParallel, and its replicas would all score with the first's head. "
                "Launch with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one"
            )
        for model in (self.model, self.ref_model):
            if model is not None:
                fuse_lm_head(self.accelerator.unwrap_model(model))
