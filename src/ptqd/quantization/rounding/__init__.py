"""How codes of weights are chosen, beyond rounding to nearest; each file here is imported and registers its method."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
