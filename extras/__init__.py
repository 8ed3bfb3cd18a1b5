"""Wings of the house: each file serves some users and could be deleted; the core knows none of
them.
"""
