# SPDX-License-Identifier: Apache-2.0
"""Command line: one module a sub-command, each with ``add_parser`` and ``run``."""
