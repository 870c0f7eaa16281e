"""What `import mutatis` costs on top of `import jax`: no device is started, and nothing else is imported."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys, jax
before = set(sys.modules)
import mutatis
new = set(sys.modules) - before
from jax._src import xla_bridge
print(len(new), sorted(name for name in new if name.partition(".")[0] != "mutatis"), xla_bridge._backends)
"""


def test_an_import_starts_no_device_and_imports_little() -> None:
    """`jax.distributed.initialize` has to be called before devices start, and may be called after this import."""
    command = [sys.executable, "-c", PROGRAM]
    count, others, devices = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert int(count) <= 120
    assert (others, devices) == ("[]", "{}")
