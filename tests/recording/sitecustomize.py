"""Every Python process of the tests that has this folder on its path notes which errors it makes.

Enters: DIST_LM_TEST_ERRORS, a folder.  Leaves: in it a file a process, `FILE:LINE` and the test, a line each.
Promises: nothing is imported before the program itself imports dist_lm.errors.
"""

import importlib.util
import os
import sys

FOLDER = "DIST_LM_TEST_ERRORS"
_MODULE = "dist_lm.errors"


def watch(errors):
    """Note where each error of this process is made."""
    original, seen = errors.DistLMError.__init__, set()

    def noting(self, what, **facts):
        frame = sys._getframe(1)
        while frame.f_locals.get("self") is self:
            # The constructor of a class of errors, called from where the error is made.
            frame = frame.f_back
        test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" (")[0]
        line = f"{frame.f_code.co_filename}:{frame.f_lineno}\t{test}\n"
        if line not in seen:
            seen.add(line)
            with open(os.path.join(os.environ[FOLDER], str(os.getpid())), "a") as file:
                file.write(line)
        original(self, what, **facts)

    errors.DistLMError.__init__ = noting


class _Finder:
    """Lets the module be found by the others, and watches it once it is there."""

    def find_spec(self, name, path=None, target=None):
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def then_watch(module):
            execute(module)
            watch(module)

        spec.loader.exec_module = then_watch
        return spec


if FOLDER in os.environ:
    sys.meta_path.insert(0, _Finder())
