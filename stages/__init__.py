"""The program: one module per stage of the experiment, in the order of dvc.yaml, and the libraries they share."""

import logging

# When it is imported, which packages do before any stage, it asks for a Hub kernel that a CPU does without.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
