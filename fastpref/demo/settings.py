# SPDX-License-Identifier: Apache-2.0
"""What trainings share that are measured, or over in a minute, whatever is trained. This module
needs transformers."""

from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback


def device() -> torch.device:
    """Where they run: the CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def configured(kind: type[Any], directory: Path, **arguments: Any) -> Any:
    """A config of TRL's: one process on one device in float32, every loss logged, nothing saved."""
    config = kind(
        output_dir=str(directory),
        use_cpu=device().type == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **arguments,
    )
    # Of several GPUs one is used: Trainer would take all in nn.DataParallel, which TRL refuses.
    config._n_gpu = min(config.n_gpu, 1)
    return config


def silenced(trainer: Any) -> Any:
    """``trainer``, which prints no logs."""
    trainer.remove_callback(PrinterCallback)
    return trainer
