"""Deep generative models of every family, trained by one trainer.

`build` gives a model and its objective, `fit` trains them, `save` and `load` keep them, `sample` draws from them,
`complete` draws what is missing of an example, `resampled` changes how a model draws, `log_prob` says how probable data
are.
Nothing is imported until it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgm_models.likelihood import log_prob
    from dgm_models.method import Method, build, fit, load, resampled, save
    from dgm_models.protocols import Batch, DataSpec
    from dgm_models.sampling import complete, sample

__all__ = [
    "Batch", "DataSpec", "Method", "build", "complete", "fit", "load", "log_prob", "resampled", "sample", "save",
]  # fmt: skip

_HOMES = {
    "Batch": "protocols",
    "DataSpec": "protocols",
    "Method": "method",
    "build": "method",
    "complete": "sampling",
    "fit": "method",
    "load": "method",
    "log_prob": "likelihood",
    "resampled": "method",
    "save": "method",
    "sample": "sampling",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"dgm_models has no {name!r}")
    return getattr(importlib.import_module(f"dgm_models.{_HOMES[name]}"), name)
