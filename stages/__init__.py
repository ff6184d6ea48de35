"""One training program per stage kind; each reads top to bottom and starts under the `deepspeed` launcher."""

import logging

# bitsandbytes announces at import that optional kernels are missing; nothing here uses them.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
