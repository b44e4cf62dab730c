"""As in tests/: two worker processes with one thread each beat two threads on small tensors."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
