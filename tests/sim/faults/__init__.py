"""What goes wrong: one function a kind of fault, in the module of what it strikes.

Each ends by itself after a while. ``scene.py`` is what they are given, ``kinds.py`` names them all,
``injector.py`` decides when which of them comes, ``healing.py`` ends whatever is left.
"""
