# SPDX-License-Identifier: Apache-2.0
"""A preference training from end to end: data, warm-up, TRL's DPOTrainer or FastDPOTrainer, a
comparison of heads. And one of images: `shapes`, `flow` and `visual`.

These, `arithmetic`, `console`, `data`, `objective` and `recipe` need nothing but torch. The other
modules import transformers, TRL and datasets at their top; import them after `require_libraries`.
"""

import logging
import os
import warnings
from importlib.util import find_spec

LIBRARIES = ("transformers", "tokenizers", "trl", "datasets", "accelerate", "matplotlib")


class DemoError(Exception):
    """Something the user can put right; the message is one line that says how."""


def require_libraries() -> None:
    """Raise `DemoError` naming the extra to install if a library of the demo is missing."""
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise DemoError(
            f'the demo needs {", ".join(missing)}, not installed here: pip install "fastpref[demo]"'
        )


def stay_offline() -> None:
    """Keep this process and its children off the network and their libraries quiet.

    Must run before huggingface_hub is imported, which reads the environment once.
    """
    os.environ.update(
        HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_DATASETS_DISABLE_PROGRESS_BARS="1",
        DO_NOT_TRACK="1",
        TOKENIZERS_PARALLELISM="false",
        TRANSFORMERS_VERBOSITY="error",
        TRL_EXPERIMENTAL_SILENCE="1",
    )


def quiet() -> None:
    """Silence progress bars and warnings of the libraries; call before anything is loaded."""
    import datasets
    import transformers

    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("trl").setLevel(logging.ERROR)
