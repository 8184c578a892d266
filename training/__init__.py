"""How the embedded models were trained, judged and published into the package; no part of it."""
