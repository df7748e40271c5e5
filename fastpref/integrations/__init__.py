# SPDX-License-Identifier: Apache-2.0
"""Drop-ins for other libraries. Each module imports its library only when it is used."""
