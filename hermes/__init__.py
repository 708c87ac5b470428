"""What the stages share: it knows no stage and no tool."""

import logging
import os
import sys

# bitsandbytes asks for a Hub kernel at its import, without which a CPU works as well.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# In a log the bars of libraries are noise; those of hermes.console are a line now and then there. tqdm reads this at its import.
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")
