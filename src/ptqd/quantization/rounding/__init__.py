"""How the codes of weights are chosen, beyond rounding to nearest."""
