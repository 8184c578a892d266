"""Networks whose features images are compared by."""
