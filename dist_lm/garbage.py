"""Python's collector of cycles, in processes that are ours alone.

Libraries make half a million objects while they are imported, which all stay.  The collector looks through
them again and again meanwhile, a fifth of the time that imports take, and once more when the process ends.
"""

import gc

_NEW_OBJECTS = 10_000
"""Python's own number is 700."""
_usual: tuple[int, int, int] | None = None


def collect_seldom() -> None:
    """Call before libraries are imported; `keep_all` ends it."""
    global _usual
    if _usual is None:
        _usual = gc.get_threshold()
        gc.set_threshold(_NEW_OBJECTS, *_usual[1:])


def keep_all() -> None:
    """Never look again at what there is now, and collect as usual what comes: a cycle may hold a device's memory.

    For when everything is imported, and before the process ends.  A process that is forked afterwards shares the
    memory, which the collector would write to.  Nothing happens in a program of somebody else's, which never called
    `collect_seldom`.
    """
    if _usual is not None:
        gc.set_threshold(*_usual)
        gc.freeze()
