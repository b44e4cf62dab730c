"""Two worker processes (pyproject.toml) with one thread each beat two threads on small tensors."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
from small import make_tree  # noqa: E402


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A folder of images in ten classes, for tests that only read it."""
    return make_tree(tmp_path_factory.mktemp("tree"))
