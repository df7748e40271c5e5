# SPDX-License-Identifier: Apache-2.0
"""Whole trainings in TRL, stock beside fastpref: the same model, data and order of batches, each in
a process of its own. Time of a step, time between backbone and loss, peak memory, and the loss of
every step.

``runs`` says what is trained and starts the processes, ``worker`` is one of them, and ``methods``
makes its trainer, which is measured as the demo's are.
"""
