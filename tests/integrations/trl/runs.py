# SPDX-License-Identifier: Apache-2.0
"""Arguments of tiny trainings, and the release of the TRL that runs them."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    RELEASE = tuple(int(part) for part in version("trl").split(".")[:2])
except PackageNotFoundError:
    RELEASE = (0, 0)

# Plain descent: an optimizer that divides by the gradient would magnify rounding.
ARGUMENTS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "logging_first_step": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
