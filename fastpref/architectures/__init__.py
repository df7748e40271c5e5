# SPDX-License-Identifier: Apache-2.0
"""Every causal language model of the installed transformers, built tiny, with its head fused,
against its full logits (``python -m fastpref architectures``).

``configurations`` makes the models small, ``comparison`` compares one, ``sweep`` goes through them
in a process that may die.
"""
