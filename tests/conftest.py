"""One torch thread for the tests and what they start: networks are small, and threads that wait for each other crawl
on a busy machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
