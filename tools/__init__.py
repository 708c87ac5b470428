"""What a person runs: one module a make target. No stage and no library imports a tool."""

import hermes  # noqa: F401  before any package, which it quietens
