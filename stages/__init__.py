"""The ten stages of dvc.yaml. No stage imports another; what two of them need is in hermes/."""

import hermes  # noqa: F401  before any package, which it quietens
