"""What runs inside the sandbox, and the walls around it; the standard library alone.

`etr.evaluate.sandbox` starts `child.main` in a fresh Python that knows this folder by its own name
and no other part of etr. Imports in here are therefore relative.
"""
