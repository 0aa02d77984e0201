"""mlmfast behind the interfaces of tools that people already use, a module a tool.

Each is an extra (``pip install "mlmfast[minicons]"``) and has a page in ``docs/``. Models are computed as transformers
computes them, ``semantics="upstream"``, unless a tool's own code means otherwise.
"""
