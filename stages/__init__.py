"""The stages of dvc.yaml. No stage imports another; what two of them need is in hermes/."""

import sys

import hermes  # noqa: F401  before any package, which it quietens
from hermes import bits

# `python -m stages.NAME` imports this first. torch, which reads what is chosen here, comes later.
if sys.argv[0] == "-m":
    bits.choose(next((name[7:] for name in sys.orig_argv if name.startswith("stages.")), ""))
