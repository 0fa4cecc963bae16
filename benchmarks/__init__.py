"""Every speed that is claimed, with its floor; one module per subject, each runnable with `python -m`."""
