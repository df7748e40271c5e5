# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: the same work through every implementation, checked before it is timed."""
