"""Set-up of all tests."""

import os

# Before torch is imported anywhere: kernel threads that wait must not keep the cores from what they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
