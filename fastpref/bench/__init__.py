# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: the same work through every implementation, checked before it is timed.

A *case* says what is measured; its *experiment* holds the candidates, the bare matrix products they
are set against, and the answer in float64; measuring gives rows of plain data, which reports draw.
"""
