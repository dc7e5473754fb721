"""`dgm` and `python -m pipelines`."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Runs one verb; what a user can get wrong ends with one line and status 2."""
    from pipelines.cli import app
    from pipelines.cluster import JobFailed

    if os.environ.get("DVC_STAGE"):
        _die_with_parent()
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("DGM_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except JobFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        sys.exit(1)


def _die_with_parent() -> None:
    """Ends this process with `dvc repro`: a SIGTERM to DVC alone would leave its stage running and writing."""
    if sys.platform == "linux":
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


if __name__ == "__main__":
    main()
