# SPDX-License-Identifier: Apache-2.0
"""Counts of the rows tier that are easy to add up."""

from typing import Any

from fastpref.bench import launches
from fastpref.bench.predictions import CALLS

COMPILED: dict[str, dict[str, Any]] = {
    name: {"registers": 40 + at, "row_loop": 10.0 + at, "seconds": 0.5, "problems": []}
    for at, name in enumerate(
        dict.fromkeys(name for call in CALLS for x in ("bf16", "fp16") for name in call.kernels(x))
    )
}
LAUNCHED = dict.fromkeys(launches.CALLS, (3, 7))
