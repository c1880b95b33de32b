"""Python's collector of cycles, in processes that are ours alone.

Libraries make half a million objects while they are imported, which all stay.  The collector looks through
them again and again meanwhile, a fifth of the time that imports take, and once more when the process ends.
"""

import gc

_NEW_OBJECTS = 10_000
"""Python's own number is 700."""


def collect_seldom() -> None:
    """Call before libraries are imported."""
    gc.set_threshold(_NEW_OBJECTS, *gc.get_threshold()[1:])


def keep_all() -> None:
    """Never look again at what there is now: call once everything is imported, and before the process ends.

    A process that is forked afterwards shares the memory, which the collector would write to.
    """
    gc.freeze()
