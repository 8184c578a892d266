"""The command line of ptqd: a package beside the library, so that ``--help`` need not wait for torch."""
