"""Runs a script, a module or ``mlmfast`` itself on this checkout, with nothing installed: no pip, no network.

    python benchmarks/from_checkout.py benchmarks/gpu.py --help
    python benchmarks/from_checkout.py -m pytest -m gpu
    python benchmarks/from_checkout.py mlmfast doctor

An installation is what makes ``kernels/`` the package ``mlmfast.kernels``; ``PYTHONPATH`` alone cannot. Here that one
module is put in its place before anything else is imported, whatever is installed besides.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def use_checkout() -> None:
    """Makes ``mlmfast`` and ``mlmfast.kernels`` those of this checkout.

    Raises:
        ImportError: another mlmfast has been imported already.
    """
    sys.path.insert(0, str(ROOT))
    import mlmfast

    if Path(mlmfast.__file__).resolve().parent != ROOT / "mlmfast":
        raise ImportError(f"mlmfast came from {mlmfast.__file__}, not from {ROOT}")
    folder = ROOT / "kernels"
    spec = importlib.util.spec_from_file_location(
        "mlmfast.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    kernels = importlib.util.module_from_spec(spec)
    sys.modules["mlmfast.kernels"] = kernels
    spec.loader.exec_module(kernels)
    mlmfast.kernels = kernels


def main() -> None:
    if len(sys.argv) < 2 or (sys.argv[1] == "-m" and len(sys.argv) < 3):
        raise SystemExit(__doc__)
    del sys.argv[0]
    use_checkout()
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif sys.argv[0] == "mlmfast":
        from mlmfast.cli import main as command

        command()
    else:
        sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
