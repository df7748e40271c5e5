# SPDX-License-Identifier: Apache-2.0
"""Modules whose objective follows their settings."""

from __future__ import annotations

from typing import Any

import torch

from ..objectives import Objective


class Configured(torch.nn.Module):
    """Makes ``objective`` from the settings, at the end of construction and whenever one of them
    changes; not at each call, which torch.compile could not trace."""

    objective: Objective

    def make_objective(self) -> Objective:
        """As the settings say. Raises ValueError or TypeError where they cannot be."""
        raise NotImplementedError

    def configure(self) -> None:
        self.__dict__["objective"] = self.make_objective()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if "objective" in self.__dict__:
            self.configure()
