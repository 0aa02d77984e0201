"""lm-evaluation-harness's own command line, with the model ``mlmfast`` in it: ``python -m mlmfast.lm_eval run ...``.

Releases of lm_eval that read entry points know the model without this; 0.4.13 does not.
"""

from __future__ import annotations

import importlib


def main() -> None:
    """Takes the arguments of ``lm_eval``.

    Raises:
        ImportError: lm_eval is not installed; the extra is named.
    """
    importlib.import_module("mlmfast.integrations.lm_eval")  # makes the model known
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
