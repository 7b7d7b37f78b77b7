"""A pytest plugin (`-p sanitized`): the tests take the library that GHOSTSERVE_TEST_LIBRARY names."""

import os
from pathlib import Path

from ghostserve import native

native.LIBRARY = Path(os.environ["GHOSTSERVE_TEST_LIBRARY"])
assert native.load().library._name == str(native.LIBRARY)
