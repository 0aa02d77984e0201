"""The narrow waist: each op's schema, fake and docstring; the choice of backend is made inside.

They are ``torch.library`` custom ops in the namespace ``mlmfast``. Packed layout throughout: rows of all copies end to
end, bounds in ``cu_seqlens``. Sums are in float32 (in float64 for float64 inputs).
"""
