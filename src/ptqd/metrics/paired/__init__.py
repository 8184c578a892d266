"""Metrics of images and those of the same seeds, one a file; each file here is imported, and registers its metric."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
