"""How each invariant is carried out; m3check/invariants.py lists them and says which case shows which."""
