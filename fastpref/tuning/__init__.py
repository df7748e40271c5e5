# SPDX-License-Identifier: Apache-2.0
"""Checks and times the tiers of scoring on the user's own card (``python -m fastpref tune``).

``judge`` runs in the caller's process; ``checks`` and ``timings`` in one that may die.
"""
