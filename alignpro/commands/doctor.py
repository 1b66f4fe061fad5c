"""`alignpro doctor`: what is installed, what this machine has, what is cached, and how to get the rest.

Nothing is fetched and no network is asked. Names no user, host or folder but the cache's.
"""

import os
import platform
import re
import shutil
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import alignpro
from alignpro.commands.shared import tell

# What each extra is for, in the order in which they are shown; their packages are the wheel's own metadata.
EXTRAS = {
    "": "verify, solve",
    "certify": "verdicts in ball arithmetic (verify --certify, hunt)",
    "testing": "alignpro.theory.testing, hunt's smallest counterexamples",
    "native": "batches of small instances as machine code",
    "report": "figures and HTML reports",
    "llm": "language models: demo, train, rollout, judge, ...",
    "http": "frozen models, rewards and judges behind an endpoint",
    "rewards": "rewards by word lists (sentiment), and instructions about languages",
    "docs": "the documentation site",
}
_REQUIREMENT = re.compile(r"([A-Za-z0-9][\w.-]*)(\[[^\]]*\])?\s*([^;]*?)\s*(?:;(.*))?$")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")


def requirements() -> dict[str, list[tuple[str, str]]]:
    """(package, version wanted) by extra; "" is what alignpro itself needs."""
    found: dict[str, list[tuple[str, str]]] = {name: [] for name in EXTRAS}
    for text in metadata.requires("alignpro") or []:
        match, extra = _REQUIREMENT.match(text), _EXTRA.search(text)
        name = extra[1] if extra else ""
        if match and name in found and match[1] != "alignpro":
            found[name].append((match[1], match[3]))
    return found


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _fits(version: str, wanted: str) -> bool:
    """Whether `version` satisfies e.g. ">=1.16,<1.17"; True where the package that can tell is not there."""
    if not wanted or find_spec("packaging") is None:
        return True
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)


def _packages() -> list[dict[str, Any]]:
    rows = []
    for extra, wanted in requirements().items():
        if not wanted:
            continue  # not in this version of the package
        parts = [{"package": name, "wants": spec, "version": _installed(name)} for name, spec in wanted]
        missing = [p["package"] for p in parts if p["version"] is None]
        old = [p["package"] for p in parts if p["version"] and not _fits(str(p["version"]), str(p["wants"]))]
        what = f"'alignpro[{extra}]'" if extra else "alignpro"
        remedy = f"pip install {what}" if missing or old else None
        about = {"extra": extra or "alignpro", "for": EXTRAS[extra], "packages": parts}
        rows.append(about | {"missing": missing, "unfit": old, "remedy": remedy})
    return rows


def _devices() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"cores": cores, "memory_gb": None, "cuda": None}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gb"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    if find_spec("torch") is not None:
        import torch

        from alignpro.llm.models import devices

        found["cuda"] = [
            f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB"
            for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ]
        found["threads"] = torch.get_num_threads()
        found["dtype"] = devices.dtype_of("auto")
    if find_spec("jax") is not None:
        import jax

        found["jax"] = [str(device.device_kind) for device in jax.devices()]
    return found


def examine() -> dict[str, Any]:
    """Everything, as JSON values."""
    from alignpro.llm.models import catalogue, packages, recipes

    folder = packages.cache_folder()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    kept = []
    for name, package in catalogue.PACKAGES.items():
        source = "npm" if package.kind == "npm" else "the Python package index"
        about = {"package": name, "size_mb": package.size_mb, "cached": packages.cached(name)}
        kept.append(about | {"from": source})
    return {
        "alignpro": alignpro.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "extras": _packages(),
        "devices": _devices(),
        "cache": {
            "folder": str(folder),
            "free_gb": round(shutil.disk_usage(there).free / 1e9, 1),
            "writable": os.access(there, os.W_OK),
            "packages": kept,
            "prompters": [
                {"prompter": name, "cached": recipes.cached(name), "cost": recipe.cost}
                for name, recipe in catalogue.RECIPES.items()
            ],
        },
        "programs": {"npm": shutil.which("npm") is not None},
    }


def table(found: dict[str, Any]) -> str:
    """For reading: what is there, and below it what to do about what is not."""
    lines = [f"alignpro {found['alignpro']}, Python {found['python']}, {found['system']}", ""]
    todo = []
    for row in found["extras"]:
        state = "ready" if row["remedy"] is None else f"lacks {', '.join([*row['missing'], *row['unfit']])}"
        lines.append(f"  {row['extra']:<9} {row['for']:<55} {state}")
        if row["remedy"]:
            todo.append(f"{row['remedy']}    # {row['for']}")
    devices = found["devices"]
    memory = f", {devices['memory_gb']:g} GB of memory" if devices["memory_gb"] else ""
    lines += ["", f"  {devices['cores']} CPU cores to use{memory}"]
    if devices["cuda"] is not None:
        gpus = "; ".join(devices["cuda"]) or "none: language models run on the CPU"
        lines.append(f"  GPUs that torch sees: {gpus}")
    if devices.get("dtype"):
        lines.append(f"  frozen models compute in {devices['dtype']} here (--dtype auto)")
    if devices.get("jax"):
        lines.append(f"  JAX runs on: {', '.join(devices['jax'])}")
    cache = found["cache"]
    lines += ["", f"  cache {cache['folder']}, {cache['free_gb']:g} GB free"]
    for row in cache["packages"]:
        state = "cached" if row["cached"] else f"fetched at first use from {row['from']}"
        lines.append(f"    {row['package']:<15} {row['size_mb']:>6.1f} MB  {state}")
    for row in cache["prompters"]:
        state = "cached" if row["cached"] else f"trained at first use, {row['cost']}"
        lines.append(f"    {row['prompter']:<27} {state}")
    if not cache["writable"]:
        todo.append("export ALIGNPRO_CACHE=FOLDER    # the cache cannot be written to")
    if not found["programs"]["npm"]:
        lines.append("    npm is not installed: minimind2-small cannot be fetched")
    lines += ["", "to do:", *(f"  {line}" for line in todo)] if todo else ["", "Nothing is missing."]
    return "\n".join(lines)


@dataclass(frozen=True)
class Doctor:
    """Tell what is installed, what this machine has, what is cached, and how to get what is missing.

    Fetches nothing and asks no network. Exit status 1 when alignpro itself lacks a package.
    """

    json: bool = False
    """Print one JSON object, instead of a table."""

    examples = (
        ("for reading", "alignpro doctor"),
        ("for a program, or for a report of a fault", "alignpro doctor --json"),
    )

    def run(self) -> int:
        found = examine()
        tell("doctor", found, table(found), self.json, None)
        return int(found["extras"][0]["remedy"] is not None)
