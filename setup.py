"""The part of the build that pyproject.toml cannot say: ``kernels/`` is the package ``mlmfast.kernels``."""

from __future__ import annotations

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"mlmfast builds with setuptools 77 or newer, found {setuptools.__version__}: "
        'pip install --upgrade "setuptools>=77", or install without --no-build-isolation'
    )

PACKAGES = setuptools.find_packages(include=["mlmfast", "mlmfast.*"])
KERNELS = setuptools.find_packages("kernels")  # its subfolders, if there are any

setuptools.setup(
    packages=[*PACKAGES, "mlmfast.kernels", *(f"mlmfast.kernels.{name}" for name in KERNELS)],
    package_dir={"mlmfast": "mlmfast", "mlmfast.kernels": "kernels"},
    package_data={"mlmfast": ["py.typed", "tiny/*"]},
    include_package_data=False,
)
