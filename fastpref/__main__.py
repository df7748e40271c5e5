# SPDX-License-Identifier: Apache-2.0
"""``python -m fastpref``: see fastpref/cli."""

from .cli.main import command

if __name__ == "__main__":
    command()
