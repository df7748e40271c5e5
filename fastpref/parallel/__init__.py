# SPDX-License-Identifier: Apache-2.0
"""Collectives with the gradients that training needs."""
