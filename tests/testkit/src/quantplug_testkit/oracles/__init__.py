"""
What the numbers must be, computed in the most obvious way, in NumPy, from the rules of the formats alone.

Nothing here imports quantplug or torch, and nothing here is fast. An oracle shares no code with what it checks.
"""
