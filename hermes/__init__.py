"""What the stages share: it knows no stage and no tool."""

import logging

# bitsandbytes asks for a Hub kernel at its import, without which a CPU works as well.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
