"""Python functions of the user's own, by `module:function` or by the file that they are in."""

import difflib
import importlib
import importlib.util
import os
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import alignpro
from alignpro.errors import AlignProError
from alignpro.files import real
from alignpro.llm.models.libraries import one_line
from alignpro.llm.models.packages import note, scrub
from alignpro.llm.rewards.reward import shown

_NAME = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
_OWN = re.compile(rf"(?P<place>{_NAME}|.*\.py):(?P<attribute>{_NAME})", re.DOTALL)
_HOME = str(Path(alignpro.__file__).parent)


def names_code(name: str) -> bool:
    """Whether `name` is `module:attribute` or `FILE.py:attribute`."""
    return _OWN.fullmatch(name) is not None


def imported(name: str) -> Any:
    """Import what `name` (see `names_code`) names. Where it comes from is said before its code runs.

    A module is looked for as Python does, and then in the working folder.

    Raises:
        AlignProError: there is no such file, module or attribute; the import failed; or the module is of
            Python's own library, which holds no reward, but much that a careless name could run.
    """
    found = _OWN.fullmatch(name)
    assert found is not None
    place, attributes = found["place"], found["attribute"]
    module: Any = _from_file(name, place) if place.endswith(".py") else _module(name, place)
    for attribute in attributes.split("."):
        if not hasattr(module, attribute):
            there = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
            near = difflib.get_close_matches(attribute, there, 1) or there[:5]
            has = f" (it has {', '.join(near)})" if near else ""
            raise AlignProError(f"reward {name}: {place} has no {attributes}{has}; check the spelling")
        module = getattr(module, attribute)
    return module


def where(error: BaseException) -> str:
    """Name the file and line of the user's code in which an exception was raised: ` at FILE:LINE`, or ""."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_HOME)]
    mine = [f for f in frames if not any(f.filename.startswith(root) for root in _LIBRARIES)]
    if not (mine or frames):
        return ""
    last = (mine or frames)[-1]
    return f" at {Path(last.filename).name}:{last.lineno}"


_LIBRARIES = tuple({str(Path(os.__file__).parent), *(str(Path(p)) for p in sys.path if "site-packages" in p)})


def _from_file(name: str, file: str) -> ModuleType:
    path = real(Path(file).expanduser())
    if not path.is_file():
        raise AlignProError(f"reward {name}: there is no file {file}; check the path")
    # A file that was edited since, as beside a notebook, is read anew.
    known = f"alignpro_own_{path.stem}_{abs(hash((path, path.stat().st_mtime_ns))):x}"
    if known in sys.modules:
        return sys.modules[known]
    spec = importlib.util.spec_from_file_location(known, path)
    assert spec is not None
    assert spec.loader is not None
    note(f"reward {name}: runs {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[known] = module  # before it runs, as its dataclasses and pickles look for it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[known]
        raise _failed(name, file, error, "mend it") from error
    return module


def _module(name: str, module: str) -> ModuleType:
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names:
        raise AlignProError(
            f"reward {name}: {top} is a module of Python's own library; name your own module, or its file as "
            "in ./mine.py:score"
        )
    if top not in sys.modules and importlib.util.find_spec(top) is None and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # last, so that nothing there is taken for a library
        importlib.invalidate_caches()
    begins = importlib.util.find_spec(top)
    if begins is not None and top not in sys.modules:  # before a package runs, to be looked into
        place = begins.origin or next(iter(begins.submodule_search_locations or ()), "")
        note(f"reward {name}: runs {module} from {place}")
    try:
        spec = importlib.util.find_spec(module)
        if spec is None:
            raise AlignProError(
                f"reward {name}: there is no module {module} here or on PYTHONPATH; name its file as in "
                f"./{module.rpartition('.')[2]}.py:score"
            )
        return importlib.import_module(module)
    except AlignProError:
        raise
    except Exception as error:
        raise _failed(name, module, error, "mend it, or put what it imports on PYTHONPATH") from error


def _failed(name: str, what: str, error: Exception, remedy: str) -> AlignProError:
    said = shown(scrub(one_line(error)), 200)
    return AlignProError(
        f"reward {name}: importing {what} failed ({type(error).__name__}: {said}{where(error)}); {remedy}"
    )
