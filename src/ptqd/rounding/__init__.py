"""How codes are chosen, one method a file."""
