"""From a bundle and its floating-point reference to a report."""

import sys

from uq.stage import Stage

sys.modules[__name__].__class__ = Stage
