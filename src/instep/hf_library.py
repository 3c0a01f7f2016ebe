"""The library `transformers`, as Instep uses it: missing, and quiet, for a team has one place where it tells things."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from instep.errors import ComponentError


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its bars of progress, reports and warnings in the block."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def no_extra() -> ComponentError:
    """The error where the library is missing."""
    return ComponentError(
        "this model comes with transformers, which is not installed; install it with: pip install 'instep[hf]'."
    )
