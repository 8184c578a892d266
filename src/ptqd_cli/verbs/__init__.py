"""The verbs, one a file: a dataclass whose fields are the options, and a ``run`` that calls the library."""
