"""Settings of Hypothesis: no deadlines, for machines are shared; in CI the same examples every time."""

import os

from hypothesis import settings

settings.register_profile("ckptflip", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("ckptflip")
